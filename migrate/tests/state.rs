//! The state of vCPUs and devices goes out as it is made and is kept until memory is complete: of any size, in
//! bounded memory; and what becomes of a VM whose state does not get there.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
#[path = "common/source.rs"]
mod source;

use std::io::{self, Read, Write};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::vm::{MEMORY as ENGINE_MEMORY, Writer, compare, engine, fill, options};
use common::{Setup, Target};
use migrate::wire::control::{Control, MAX_STATE_PART, state_limit};
use migrate::{
    CancelFlag, Expected, LiveVm, PlainMemory, ReceiveError, Report, SendError, SessionId, SourceOptions,
    SourceVm, StateSpool, TargetMemory, VmError, send,
};
use source::{MEMORY, Source};
use testkit::{Reason, skip};

const MIB: u64 = 1 << 20;
/// What of a state a target of these tests keeps in memory.
const IN_MEMORY: u64 = 4 * MIB;
/// What a target of the first version takes.
const LIMIT: u64 = state_limit(2).expect("that one has a limit");

/// A state without end, in blocks none of which is like another.
struct Content {
    block: Vec<u8>,
    number: u64,
}

impl Content {
    const BLOCK: usize = 64 << 10;

    fn new() -> Content {
        let mix = |at: u64| (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8;
        Content { block: (0..Content::BLOCK as u64).map(mix).collect(), number: 0 }
    }

    fn next(&mut self, left: u64) -> &[u8] {
        let stamp = self.number.to_le_bytes();
        self.block[..8].copy_from_slice(&stamp);
        self.block[Content::BLOCK - 8..].copy_from_slice(&stamp);
        self.number += 1;
        &self.block[..left.min(Content::BLOCK as u64) as usize]
    }
}

/// Whether a state is so many bytes of that content.
fn check(bytes: u64, state: &mut dyn Read) -> io::Result<()> {
    let (mut content, mut found) = (Content::new(), vec![0; Content::BLOCK]);
    let mut left = bytes;
    while left > 0 {
        let block = content.next(left);
        state.read_exact(&mut found[..block.len()])?;
        assert!(found[..block.len()] == *block, "the state differs {left} bytes before its end");
        left -= block.len() as u64;
    }
    assert_eq!(state.read(&mut found)?, 0, "it has more than {bytes} bytes");
    Ok(())
}

/// What happens when so much of its state is written.
type Event = Option<(u64, Box<dyn Fn()>)>;

/// A VM with much state.
struct Large {
    writer: Writer,
    /// What it says before each round, the last for all that come after; what it then has.
    expected: Vec<u64>,
    state: u64,
    /// How much of that it could write.
    saved: u64,
    asked: usize,
    pauses: usize,
    event: Event,
}

impl LiveVm for Large {
    fn drain(&mut self) -> Result<(), VmError> {
        Ok(())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        self.pauses += 1;
        self.writer.pause()
    }

    fn stood_still(&self) -> bool {
        false
    }

    fn resume(&mut self) -> Result<(), VmError> {
        self.writer.resume()
    }

    fn save(&mut self, to: &mut dyn Write) -> Result<(), VmError> {
        let (mut content, mut left) = (Content::new(), self.state);
        while left > 0 {
            if let Some((_, happens)) = self.event.take_if(|event| self.state - left >= event.0) {
                happens();
            }
            let block = content.next(left);
            to.write_all(block).map_err(|source| VmError::Io { doing: "saving its state", source })?;
            left -= block.len() as u64;
            self.saved = self.state - left;
        }
        Ok(())
    }

    fn expected(&mut self) -> Expected {
        let state_bytes = self.expected[self.asked.min(self.expected.len() - 1)];
        self.asked += 1;
        Expected { state_bytes, ..Expected::default() }
    }

    fn throttle(&mut self, percent: u8) {
        self.writer.throttle(percent);
    }
}

impl SourceVm for Large {
    fn give_up_name(&mut self, session: SessionId) -> Result<(), VmError> {
        self.writer.give_up_name(session)
    }

    fn take_name_back(&mut self) {
        self.writer.take_name_back();
    }
}

struct Moved {
    /// How often it was asked what it expects, and how often it was stopped.
    asked: usize,
    pauses: usize,
    /// How much of its state it could write.
    saved: u64,
    result: Result<Report, SendError>,
    target: Target,
}

/// A VM that is to move.
struct Case<'a> {
    expected: &'a [u64],
    state: u64,
    /// The target keeps its state there, encrypted or not; else where the test's files are.
    spool: Option<&'a Path>,
    /// Room on that disk that is no VM's.
    room: u64,
    encrypt: bool,
    highest: Option<u16>,
    /// When so much of the state is written, the link breaks.
    cut_at: Option<u64>,
    /// When so much of it is written, the migration is cancelled.
    cancel_at: Option<u64>,
}

impl Case<'_> {
    fn of(state: u64) -> Case<'static> {
        Case {
            expected: &[0],
            state,
            spool: None,
            room: u64::MAX,
            encrypt: false,
            highest: None,
            cut_at: None,
            cancel_at: None,
        }
    }

    fn moved(&self, change: impl FnOnce(&mut SourceOptions)) -> Moved {
        let (place, spool) = (common::place(), common::place());
        let here = engine(&place, ENGINE_MEMORY);
        fill(&here);
        let memory = PlainMemory::new(ENGINE_MEMORY).unwrap();
        let directory = self.spool.unwrap_or(spool.path()).to_path_buf();
        let spool = StateSpool {
            directory: directory.clone(),
            memory_bytes: IN_MEMORY as usize,
            disk_bytes: self.room,
            encrypt: self.encrypt,
            lock: false,
        };
        let setup = Setup { spool: Some(spool), highest: self.highest };
        let target = Target::start_with(TargetMemory::Plain(memory.clone()), setup);
        let bytes = self.state;
        *target.vm.taker.lock().unwrap() = Some(Box::new(move |state| check(bytes, state)));
        let writer = Writer::start(here.memory_base() as usize, 0..100);
        let cut = target.cut();
        let cancel: &'static CancelFlag = Box::leak(Box::new(CancelFlag::new(false)));
        let cancels = || cancel.store(true, std::sync::atomic::Ordering::Relaxed);
        let event: Event = match (self.cut_at, self.cancel_at) {
            (Some(at), _) => Some((at, Box::new(cut))),
            (None, Some(at)) => Some((at, Box::new(cancels))),
            (None, None) => None,
        };
        let expected = self.expected.to_vec();
        let mut vm = Large { writer, expected, state: self.state, saved: 0, asked: 0, pauses: 0, event };
        let mut options = options(target.address);
        change(&mut options);
        let result = send(&here.handle(), &mut vm, &options, &|_| {}, cancel);
        match &result {
            Ok(_) => compare(&here, memory.base()),
            Err(error) => {
                assert!(error.still_here(), "{error:?}");
                vm.writer.assert_runs_here();
                assert!(!target.vm.is_started());
            }
        }
        let left = std::fs::read_dir(directory).unwrap().count();
        assert_eq!(left, 0, "files of the state are left behind");
        // The writer ends before the memory to which it writes.
        let Large { asked, pauses, saved, .. } = vm;
        Moved { asked, pauses, saved, result, target }
    }
}

/// The most memory that this process has had.
fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// Both sides are in this process.
#[test]
fn three_gigabytes_of_state_move_in_bounded_memory() {
    const STATE: u64 = 3 << 30;
    const MOST: u64 = 200 * MIB;
    let moved = Case { expected: &[STATE], ..Case::of(STATE) }.moved(|_| {});
    let report = moved.result.unwrap();
    moved.target.result().unwrap();
    let beside = peak_bytes().saturating_sub(2 * ENGINE_MEMORY);
    println!(
        "{} MiB of state in {:.0} ms; at most {} MiB of memory beside the guest's, on both sides together: {report:?}",
        STATE / MIB,
        report.downtime_ms,
        beside / MIB
    );
    assert!(report.bytes_sent > STATE, "{report:?}");
    assert!(beside < MOST, "{beside} bytes");
}

#[test]
fn a_state_of_any_size_arrives_whole_kept_in_memory_or_on_a_disk() {
    let part = MAX_STATE_PART as u64;
    for state in [0, 1, part - 1, part, part + 1, IN_MEMORY, IN_MEMORY + part, IN_MEMORY + 3 * part + 5] {
        Case::of(state).moved(|_| {}).result.unwrap_or_else(|error| panic!("{state} bytes: {error:?}"));
    }
    let moved = Case { encrypt: true, ..Case::of(IN_MEMORY + 90 * MIB + 5) }.moved(|_| {});
    moved.result.unwrap();
}

#[test]
fn a_vm_with_more_state_than_an_older_target_takes_is_not_stopped() {
    // Known at once, and found out in a later round.
    for expected in [&[LIMIT + 1][..], &[0, LIMIT + 1]] {
        let case = Case { expected, highest: Some(2), ..Case::of(1) };
        let moved = case.moved(|options| {
            options.downtime_target = Duration::ZERO;
            options.max_rounds = 5;
        });
        let error = moved.result.unwrap_err();
        assert!(
            matches!(&error, SendError::Vm(VmError::TooMuchState { bytes, most: LIMIT }) if *bytes == LIMIT + 1),
            "{error:?}"
        );
        assert_eq!((moved.pauses, moved.asked), (0, expected.len()));
        // The target is told why.
        let told = moved.target.result().unwrap_err();
        assert!(
            matches!(&told, ReceiveError::GaveUp(text) if text.contains("update vmemd there")),
            "{told:?}"
        );
    }
    let fits = Case { expected: &[LIMIT], highest: Some(2), ..Case::of(LIMIT) };
    fits.moved(|_| {}).result.unwrap();
}

#[test]
fn a_vm_that_has_more_state_than_it_said_runs_on_here() {
    let moved = Case { highest: Some(2), ..Case::of(LIMIT + 10 * MIB) }.moved(|_| {});
    let error = moved.result.unwrap_err();
    assert!(matches!(error, SendError::Vm(VmError::TooMuchState { .. })), "{error:?}");
    assert_eq!(moved.pauses, 1);
}

#[test]
fn a_state_that_takes_longer_than_the_vm_may_stand_still_is_known_before() {
    let moved = Case { expected: &[300 * MIB], ..Case::of(300 * MIB) }.moved(|options| {
        options.max_downtime = Some(Duration::from_millis(100));
        options.max_rounds = 3;
    });
    assert!(matches!(moved.result, Err(SendError::Downtime(_))), "{:?}", moved.result);
    assert_eq!(moved.pauses, 0);
}

#[test]
fn a_state_that_takes_longer_than_was_expected_is_given_up_in_time() {
    let moved = Case::of(2000 * MIB).moved(|options| options.max_downtime = Some(Duration::from_millis(200)));
    let Err(SendError::Downtime(text)) = &moved.result else { panic!("{:?}", moved.result) };
    assert!(text.contains("it has stood still for the 200 ms"), "{text}");
    assert_eq!(moved.pauses, 1);
}

#[test]
fn a_link_that_breaks_in_the_middle_of_the_state_leaves_the_vm_here() {
    for cut_at in [1, 10 * MIB, 40 * MIB] {
        let moved = Case { cut_at: Some(cut_at), ..Case::of(2000 * MIB) }.moved(|_| {});
        let error = moved.result.unwrap_err();
        assert!(matches!(error, SendError::Link { .. }), "{error:?}");
        assert!(moved.target.result().is_err());
        // It stands still for no more of its state than the kernel and the queue took before the break was seen.
        assert!((cut_at..cut_at + 100 * MIB).contains(&moved.saved), "{} bytes behind {cut_at}", moved.saved);
    }
}

#[test]
fn a_cancel_in_the_middle_of_the_state_is_heeded_there() {
    let moved = Case { cancel_at: Some(10 * MIB), ..Case::of(2000 * MIB) }.moved(|_| {});
    assert!(matches!(moved.result, Err(SendError::Cancelled)), "{:?}", moved.result);
    assert!(moved.saved < 12 * MIB, "{} bytes were saved", moved.saved);
    assert!(moved.target.result().is_err());
}

#[test]
fn room_that_other_vms_were_promised_is_not_a_states() {
    let moved = Case { room: 5 * MIB, ..Case::of(IN_MEMORY + 6 * MIB) }.moved(|_| {});
    let told = moved.target.result().unwrap_err();
    let ReceiveError::Spool { source, .. } = &told else { panic!("{told:?}") };
    assert!(
        source.kind() == io::ErrorKind::StorageFull && source.to_string().contains("was promised"),
        "{told:?}"
    );
    assert_eq!(moved.pauses, 1);
    for (room, state) in [(5 * MIB, IN_MEMORY + 5 * MIB), (0, IN_MEMORY)] {
        Case { room, ..Case::of(state) }.moved(|_| {}).result.unwrap();
    }
}

/// A file system in memory that is small.
struct Small<'a>(&'a Path);

impl Small<'_> {
    fn mount(at: &Path) -> Small<'_> {
        if !rustix::process::geteuid().is_root() {
            skip(Reason::Root, "a mount");
        }
        let done =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=8M", "vmemd-test"]).arg(at).status();
        assert!(done.expect("mount").success());
        Small(at)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0).status();
    }
}

#[test]
fn a_target_whose_disk_is_full_says_so_and_the_vm_runs_on_here() {
    let place = common::place();
    let disk = Small::mount(place.path());
    let moved = Case { spool: Some(disk.0), ..Case::of(40 * MIB) }.moved(|_| {});
    let told = moved.target.result().unwrap_err();
    let ReceiveError::Spool { directory, source } = &told else { panic!("{told:?}") };
    assert!(directory == disk.0 && source.kind() == io::ErrorKind::StorageFull, "{told:?}");
    let error = moved.result.unwrap_err();
    let SendError::GaveUp(text) = &error else { panic!("{error:?}") };
    assert!(text.contains("cannot be kept in") && text.contains("No space left on device"), "{text}");
    assert_eq!(moved.pauses, 1);
    // One that needs less of it moves.
    Case { spool: Some(disk.0), ..Case::of(10 * MIB) }.moved(|_| {}).result.unwrap();
}

/// What a target says of a source that sends this.
fn refusal(say: impl FnOnce(&mut Source)) -> String {
    let target = Target::start(TargetMemory::Plain(PlainMemory::new(MEMORY).unwrap()));
    let mut source = Source::connect(&target);
    say(&mut source);
    let error = target.result().unwrap_err();
    assert!(!target.vm.is_started());
    assert!(matches!(error, ReceiveError::Peer(_)), "{error:?}");
    error.to_string()
}

#[test]
fn parts_of_a_state_come_in_order_and_at_their_time_or_not_at_all() {
    let part = |at, bytes: &[u8], last| Control::State { at, bytes: bytes.to_vec(), last };
    for (at, next) in [(3, "byte 3 after byte 2"), (1, "byte 1 after byte 2"), (u64::MAX, "after byte 2")] {
        let text = refusal(|source| {
            source.heat();
            source.say(&part(0, b"ab", false));
            source.say(&part(at, b"cd", true));
        });
        assert!(text.contains(next), "{text}");
    }
    let text = refusal(|source| {
        source.heat();
        source.say(&part(5, b"ab", true));
    });
    assert!(text.contains("byte 5 after byte 0"), "{text}");
    let late = refusal(|source| {
        source.heat();
        source.say(&part(0, b"ab", true));
        source.say(&part(2, b"cd", true));
    });
    let early = refusal(|source| source.say(&part(0, b"ab", true)));
    let without_end = refusal(|source| {
        let totals = source.whole();
        source.say(&part(0, b"ab", false));
        source.say(&Control::Final(totals));
    });
    for (text, what) in [(late, "VM state"), (early, "VM state"), (without_end, "the end of the memory")] {
        assert!(text.contains(&format!("{what} at the wrong time")), "{text}");
    }
}
