//! What is to go wrong in a seed, and at which step.

use std::time::Duration;

use super::LONG;
use crate::sim::faults::{Class, Fault, Later, Planned, Step, is_impossible};
use crate::sim::guest::Chore;
use crate::sim::world::world;
use crate::wire::opening::RefuseKind;

pub(super) fn draw(target: Option<(Step, Class)>) -> Vec<Planned> {
    let random = &world().random;
    let mut plan = Vec::new();
    if let Some((step, class)) = target.filter(|(step, class)| !is_impossible(*step, *class)) {
        if step >= Step::Asked {
            // Something must make the source ask.
            let fault = random.pick(&[Fault::Cut { all: true }, Fault::TargetDies]);
            let step = random.pick(&[Step::CommitSent, Step::Recorded]);
            plan.push(Planned { step, later: Later::Now, fault });
        }
        let later = if random.one_in(2) { Later::Now } else { later() };
        plan.push(Planned { step, later, fault: draw_fault(class, step) });
    }
    if target.is_none() && random.one_in(2) {
        let step = random.pick(&[Step::Connecting, Step::Accepted]);
        plan.push(Planned { step, later: Later::Now, fault: Fault::Twice });
    }
    if random.one_in(8) {
        // What one stream has of the last round, and nothing else, is lost.
        plan.push(Planned { step: Step::LastRound, later: Later::Now, fault: Fault::Cut { all: false } });
    }
    while random.one_in(3) {
        let step = random.pick(&Step::ALL);
        let class = random.pick(&Class::ALL);
        let fault = match random.below(4) {
            0 => Fault::Twice,
            1 => Fault::Spoilt { after: random.below(300_000) },
            _ => draw_fault(class, step),
        };
        plan.push(Planned { step, later: later(), fault });
    }
    if random.one_in(8) {
        // The commit may come when it has been asked for already, and still in time.
        plan.push(Planned {
            step: Step::CommitSent,
            later: Later::Now,
            fault: Fault::Silence { silent: [true, false], lasts: Duration::from_secs(14) },
        });
    }
    if random.one_in(8) {
        // The VM runs there, its record cannot be flushed, and then its process dies: the source asks before and behind
        // that.
        let disk = Fault::Disk { skip: random.below(2) as u32, count: 2 + random.below(12) as u32 };
        for fault in [disk, Fault::Cut { all: true }] {
            plan.push(Planned { step: Step::Recorded, later: Later::Now, fault });
        }
        plan.push(Planned { step: Step::Asked, later: later(), fault: Fault::TargetDies });
    }
    if random.one_in(8) {
        // The source asks while the target finds out that the VM cannot run there.
        let step = random.pick(&[Step::CommitSent, Step::Recorded]);
        let disk = Fault::Disk { skip: random.below(4) as u32, count: 1 + random.below(4) as u32 };
        let trouble = random.pick(&[
            disk,
            Fault::Fails(Chore::Start),
            Fault::HostCrashes,
            Fault::Swept,
            Fault::TargetDies,
        ]);
        // A process may die at any moment of that.
        let when = match trouble {
            Fault::TargetDies => Later::Time(world().delay(Duration::from_millis(40))),
            _ => Later::Now,
        };
        plan.push(Planned { step, later: when, fault: trouble });
        let away = random.pick(&[
            Fault::Cut { all: true },
            Fault::Silence { silent: [false, true], lasts: Duration::from_secs(14) },
        ]);
        let soon = Later::Time(world().delay(Duration::from_millis(20)));
        plan.push(Planned { step, later: soon, fault: away });
    }
    world().note(|| format!("planned: {plan:?}"));
    plan
}

fn draw_fault(class: Class, step: Step) -> Fault {
    let random = &world().random;
    match class {
        Class::Cut => Fault::Cut { all: random.one_in(3) },
        Class::Silence => {
            let silent = random.pick(&[[true, true], [true, false], [false, true]]);
            // Just long enough that the source asks while its commit is still on its way.
            let [short, middle] = [14, 25].map(Duration::from_secs);
            let lasts = if step == Step::CommitSent {
                random.pick(&[short, short, LONG])
            } else {
                random.pick(&[Duration::from_secs(1), short, middle, LONG, LONG])
            };
            Fault::Silence { silent, lasts }
        }
        Class::SourceDies => Fault::SourceDies,
        Class::TargetDies => Fault::TargetDies,
        Class::HostDies => random.pick(&[Fault::DaemonDies, Fault::HostCrashes]),
        Class::Refusal => draw_refusal(step),
    }
}

fn draw_refusal(step: Step) -> Fault {
    let random = &world().random;
    let disk = Fault::Disk { skip: random.below(3) as u32, count: 1 + random.below(4) as u32 };
    let anybody = [
        Fault::Cancel { source: true },
        Fault::Cancel { source: false },
        Fault::EngineFails { source: true },
        Fault::EngineFails { source: false },
    ];
    match step {
        Step::Connecting => {
            let kinds = [RefuseKind::Version, RefuseKind::NameTaken, RefuseKind::NoRoom, RefuseKind::Other];
            Fault::Turned(random.pick(&kinds))
        }
        Step::Offered => random.pick(&[disk, Fault::Cancel { source: true }]),
        Step::LaterRounds => random.pick(&[
            Fault::Fails(Chore::Drain),
            Fault::Fails(Chore::Pause),
            Fault::Fails(Chore::Save),
            anybody[0],
            anybody[2],
            anybody[3],
        ]),
        Step::StateSent | Step::LastRound | Step::FinalSent => random.pick(&[
            Fault::Fails(Chore::Load),
            Fault::Fails(Chore::GiveUpName),
            anybody[1],
            anybody[3],
            disk,
        ]),
        Step::Prepared | Step::CommitSent => {
            random.pick(&[Fault::Fails(Chore::Start), Fault::Fails(Chore::Start), disk, disk, anybody[1]])
        }
        Step::Recorded => random.pick(&[Fault::Fails(Chore::Start), Fault::Fails(Chore::Start), disk]),
        Step::Asked => random.pick(&[disk, Fault::Cancel { source: true }]),
        _ => random.pick(&anybody),
    }
}

fn later() -> Later {
    let random = &world().random;
    match random.below(3) {
        0 => Later::Now,
        1 => {
            let most = random.pick(&[40, 2000, 100_000]);
            Later::Bytes { side: random.below(2) as usize, count: 1 + random.below(most) }
        }
        _ => Later::Time(world().delay(random.pick(&[Duration::from_millis(20), Duration::from_secs(1)]))),
    }
}
