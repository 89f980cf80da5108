//! Legal messages in an order that is not: a whole migration's script with steps left out, repeated, swapped and added.

mod common;
#[path = "common/source.rs"]
mod source;

use common::Target;
use migrate::tls::Security;
use migrate::wire::control::{Control, Totals};
use migrate::wire::heat::parts;
use migrate::wire::record::{Header, RecordKind};
use migrate::{Outcome, PlainMemory, TargetMemory};
use proptest::prelude::*;
use proptest::sample::Index;
use source::{MEMORY, PAGES, Source};

/// What a source may say at some time.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Step {
    Heat,
    Content,
    Zeros(usize),
    Poisoned,
    End {
        stream: usize,
        round: u64,
        last: bool,
    },
    State,
    Final,
    Commit,
    Alive,
    Abort,
    /// Waits for the target to be ready.
    Listen,
    /// What only a target may say.
    Answer,
    CutStream,
    SecondStream,
}

const SCRIPT: [Step; 10] = [
    Step::Heat,
    Step::Zeros(0),
    Step::Content,
    Step::Zeros(1),
    Step::End { stream: 0, round: 1, last: true },
    Step::End { stream: 1, round: 1, last: true },
    Step::State,
    Step::Final,
    Step::Listen,
    Step::Commit,
];

fn any_step() -> impl Strategy<Value = Step> {
    let end = (0..2_usize, 1..4_u64, any::<bool>());
    prop_oneof![
        Just(Step::Heat),
        Just(Step::Content),
        (0..2_usize).prop_map(Step::Zeros),
        Just(Step::Poisoned),
        end.prop_map(|(stream, round, last)| Step::End { stream, round, last }),
        Just(Step::State),
        Just(Step::Final),
        Just(Step::Commit),
        Just(Step::Alive),
        Just(Step::Abort),
        Just(Step::Answer),
        Just(Step::CutStream),
        Just(Step::SecondStream),
    ]
}

#[derive(Clone, Debug)]
enum Edit {
    LeftOut(Index),
    Repeated(Index),
    Swapped(Index, Index),
    Added(Index, Step),
}

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let edit = prop_oneof![
        any::<Index>().prop_map(Edit::LeftOut),
        any::<Index>().prop_map(Edit::Repeated),
        any::<(Index, Index)>().prop_map(|(one, other)| Edit::Swapped(one, other)),
        (any::<Index>(), any_step()).prop_map(|(at, step)| Edit::Added(at, step)),
    ];
    prop::collection::vec(edit, 0..4)
}

fn edited(edits: &[Edit]) -> Vec<Step> {
    let mut script = SCRIPT.to_vec();
    for edit in edits {
        let len = script.len();
        match edit {
            Edit::LeftOut(at) => drop(script.remove(at.index(len))),
            Edit::Repeated(at) => script.insert(at.index(len), script[at.index(len)]),
            Edit::Swapped(one, other) => script.swap(one.index(len), other.index(len)),
            Edit::Added(at, step) => script.insert(at.index(len), *step),
        }
    }
    script
}

/// A source that counts what it sends, as the target does.
struct Teller {
    source: Source,
    sent: [Totals; 2],
    /// It waits for the target to be ready however long that takes, for it will be; else only for as long as the
    /// target says something.
    waits: bool,
}

impl Teller {
    fn tell(&mut self, target: &Target, step: Step) {
        let source = &mut self.source;
        match step {
            Step::Heat => parts(&[0; PAGES as usize]).for_each(|part| source.say(&Control::Heat(part))),
            Step::Content => {
                source.pages(0, &[(3, 1)], 9);
                self.sent[0].pages += 1;
            }
            Step::Zeros(stream) => {
                source.zeros(stream, &[(stream as u64 * 512, 512)]);
                self.sent[stream].zeros += 512;
            }
            Step::Poisoned => {
                let meta = (5_u64 << 12 | 1).to_le_bytes();
                let header = Header { pages: 1, ..Header::plain(RecordKind::Poisoned, 1, meta.len()) };
                source.record(0, &header, &meta, &[]);
                self.sent[0].poisoned += 1;
            }
            Step::End { stream, round, last } => source.end(stream, round, self.sent[stream], last),
            Step::State => source.state(),
            Step::Final => {
                let [one, other] = self.sent;
                source.say(&Control::Final(Totals {
                    pages: one.pages + other.pages,
                    zeros: one.zeros + other.zeros,
                    poisoned: one.poisoned + other.poisoned,
                }));
            }
            Step::Commit => source.say(&Control::Commit { paused: false }),
            Step::Listen if self.waits => while !matches!(source.hear(), Control::Prepared { .. }) {},
            Step::Listen => source.listen(),
            Step::Alive => source.say(&Control::Alive),
            Step::Abort => source.say(&Control::Abort("changed its mind".to_owned())),
            Step::Answer => source.say(&Control::Running { took: Default::default() }),
            Step::CutStream => source.cut_stream(1),
            Step::SecondStream => source.open_stream_again(target, 1),
        }
    }
}

/// Tells the script; says whether the target runs the VM.
fn run(script: &[Step], waits: bool) -> Result<bool, TestCaseError> {
    let memory = PlainMemory::new(MEMORY).unwrap();
    let target = Target::start(TargetMemory::Plain(memory.clone()));
    let mut teller = Teller { source: Source::connect(&target), sent: Default::default(), waits };
    script.iter().for_each(|step| teller.tell(&target, *step));
    teller.source.listen();
    teller.source.hang_up();
    let result = target.result();
    let runs = target.vm.is_started();
    let told = migrate::resolve(&target.address.to_string(), &Security::ThisHost, target.session).unwrap();
    prop_assert_eq!(told == Outcome::RunningThere, runs);
    if result.is_ok() {
        prop_assert!(runs);
    }
    if runs {
        prop_assert!(script.contains(&Step::Commit) && script.contains(&Step::State));
        // What comes behind the end of its stream is not read.
        let end = script.iter().position(|step| matches!(step, Step::End { stream: 0, last: true, .. }));
        let taken = &script[..end.expect("a memory that is complete")];
        prop_assert!(!taken.contains(&Step::Poisoned));
        let content = taken.iter().rposition(|step| *step == Step::Content);
        let zeros = taken.iter().rposition(|step| *step == Step::Zeros(0));
        // SAFETY: page 3 of a mapping that nobody writes to any more.
        let byte = unsafe { memory.base().add(3 * swapd::PAGE_SIZE + 17).read() };
        prop_assert_eq!(byte, if content > zeros { 9 } else { 0 }, "{:?}", script);
    }
    Ok(runs)
}

/// Few, for each waits for a while; more with PROPTEST_CASES.
fn cases() -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(48)
}

#[test]
fn the_script_itself_moves_the_vm() {
    assert!(run(&SCRIPT, true).unwrap());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn any_order_ends_in_an_error_or_in_a_vm_that_runs(edits in edits()) {
        run(&edited(&edits), false)?;
    }
}
