//! The limit on the state of a VM's vCPUs and devices, and when a migration notices that a VM has more.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
#[path = "common/source.rs"]
mod source;

use std::time::Duration;

use common::Target;
use common::vm::{MEMORY as ENGINE_MEMORY, Writer, compare, engine, fill, options};
use migrate::wire::control::{Control, MAX_STATE_BYTES, MAX_STATE_PART};
use migrate::{
    CancelFlag, Expected, PlainMemory, ReceiveError, Report, SendError, SessionId, SourceOptions, SourceVm,
    TargetMemory, VmError, send,
};
use source::{MEMORY, Source};

/// A VM with much state.
struct Large {
    writer: Writer,
    /// What it says before each round, the last for all that come after; what it then has.
    expected: Vec<usize>,
    state: usize,
    asked: usize,
    pauses: usize,
}

/// Pseudo-random, so that no part can stand for another.
fn content(bytes: usize) -> Vec<u8> {
    (0..bytes as u64).map(|at| (at.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 56) as u8).collect()
}

impl SourceVm for Large {
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

    fn save(&mut self) -> Result<Vec<u8>, VmError> {
        // More than is allowed is not looked at: its pages need not be there.
        Ok(if self.state > MAX_STATE_BYTES { vec![0; self.state] } else { content(self.state) })
    }

    fn expected(&mut self) -> Expected {
        let state_bytes = self.expected[self.asked.min(self.expected.len() - 1)] as u64;
        self.asked += 1;
        Expected { state_bytes, ..Expected::default() }
    }

    fn throttle(&mut self, percent: u8) {
        self.writer.throttle(percent);
    }

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
    result: Result<Report, SendError>,
    target: Target,
}

/// Moves such a VM.
fn moved(expected: &[usize], state: usize, change: impl FnOnce(&mut SourceOptions)) -> Moved {
    let place = common::place();
    let here = engine(&place, ENGINE_MEMORY);
    fill(&here);
    let memory = PlainMemory::new(ENGINE_MEMORY).unwrap();
    let target = Target::start(TargetMemory::Plain(memory.clone()));
    let writer = Writer::start(here.memory_base() as usize, 0..100);
    let mut vm = Large { writer, expected: expected.to_vec(), state, asked: 0, pauses: 0 };
    let mut options = options(target.address);
    change(&mut options);
    let result = send(&here.handle(), &mut vm, &options, &|_| {}, &CancelFlag::new(false));
    match &result {
        Ok(_) => compare(&here, memory.base()),
        Err(error) => {
            assert!(error.still_here(), "{error:?}");
            vm.writer.assert_runs_here();
            assert!(!target.vm.is_started());
        }
    }
    // The writer ends before the memory to which it writes.
    let Large { asked, pauses, .. } = vm;
    Moved { asked, pauses, result, target }
}

#[test]
fn more_state_than_any_record_and_queue_holds_arrives() {
    // More than the 64 MiB that were once the limit.
    const BYTES: usize = (96 << 20) + 5;
    const _: () = assert!(BYTES > MAX_STATE_PART && BYTES < MAX_STATE_BYTES);
    let moved = moved(&[BYTES], BYTES, |_| {});
    let report = moved.result.unwrap();
    moved.target.result().unwrap();
    assert!(moved.target.vm.loaded.lock().unwrap().as_deref() == Some(content(BYTES).as_slice()));
    assert!(report.bytes_sent > BYTES as u64, "{report:?}");
}

#[test]
fn a_vm_with_too_much_state_is_not_stopped() {
    // Known at once, and found out in a later round.
    for expected in [vec![MAX_STATE_BYTES + 1], vec![0, MAX_STATE_BYTES + 1]] {
        let rounds = expected.len();
        let moved = moved(&expected, 1, |options| {
            options.downtime_target = Duration::ZERO;
            options.max_rounds = 5;
        });
        let error = moved.result.unwrap_err();
        assert!(
            matches!(&error, SendError::Vm(VmError(text)) if text.contains("1073741825 bytes of state")),
            "{error:?}"
        );
        assert_eq!((moved.pauses, moved.asked), (0, rounds));
        // The target is told why.
        let told = moved.target.result().unwrap_err();
        assert!(matches!(&told, ReceiveError::GaveUp(text) if text.contains("bytes of state")), "{told:?}");
    }
}

#[test]
fn a_vm_that_has_more_state_than_it_said_runs_on_here() {
    let moved = moved(&[0], MAX_STATE_BYTES + 1, |_| {});
    assert!(matches!(moved.result, Err(SendError::Vm(_))), "{:?}", moved.result);
    assert_eq!(moved.pauses, 1);
}

#[test]
fn a_state_that_takes_longer_than_the_vm_may_stand_still_is_known_before() {
    let moved = moved(&[MAX_STATE_BYTES], MAX_STATE_BYTES, |options| {
        options.max_downtime = Some(Duration::from_millis(1));
        options.max_rounds = 3;
    });
    assert!(matches!(moved.result, Err(SendError::Downtime(_))), "{:?}", moved.result);
    assert_eq!(moved.pauses, 0);
}

#[test]
fn a_source_that_sends_more_state_than_is_taken_is_sent_away() {
    let target = Target::start(TargetMemory::Plain(PlainMemory::new(MEMORY).unwrap()));
    let mut source = Source::connect(&target);
    source.heat();
    source.say(&Control::State { at: MAX_STATE_BYTES as u64, bytes: vec![0], last: true });
    assert!(
        matches!(target.result(), Err(ReceiveError::Peer(text)) if text.contains("bytes of VM state of 1073741825"))
    );
}
