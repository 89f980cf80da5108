use super::*;

/// Every hold, by a word of two letters: `p` if it is paused; `R` if it is stalled and ran before, `S` if it stood
/// still before, small if it is relieved.
const HOLDS: [&str; 10] = ["--", "p-", "-R", "-S", "-r", "-s", "pR", "pS", "pr", "ps"];

fn hold(word: &str) -> Hold {
    let (pause, stall) = word.split_at(1);
    let mut hold = Hold::Free;
    if stall != "-" {
        assert!(hold.stall(Want::Frames, "full".to_owned()));
        if stall.eq_ignore_ascii_case("s") {
            hold.stood_before();
        }
        if stall != stall.to_uppercase() {
            hold.ease(Want::Frames);
        }
    }
    if pause == "p" {
        hold.pause_by(BY_VMEMD);
    }
    hold
}

fn word(hold: &Hold) -> String {
    let stall = match hold.stalled().map(|stall| (stall.ran, stall.relieved)) {
        None => '-',
        Some((true, false)) => 'R',
        Some((false, false)) => 'S',
        Some((true, true)) => 'r',
        Some((false, true)) => 's',
    };
    format!("{}{stall}", if hold.paused().is_some() { 'p' } else { '-' })
}

fn whereabouts() -> [Whereabouts; 5] {
    let to = || "b:7".to_owned();
    let (session, security, since) = (SessionId([7; 16]), Security::Plain, Instant::now());
    [
        Whereabouts::Arriving,
        Whereabouts::Here,
        Whereabouts::Migrating,
        Whereabouts::InDoubt { session, security, to: to(), since, said: "no".to_owned() },
        Whereabouts::Moved { to: to() },
    ]
}

/// Which of these [`whereabouts`] it is.
const HERE: usize = 1;
const MIGRATING: usize = 2;
const IN_DOUBT: usize = 3;

#[test]
fn the_words_are_of_all_holds() {
    for name in HOLDS {
        assert_eq!(word(&hold(name)), name);
    }
}

#[test]
fn every_event_changes_every_hold_as_the_table_says() {
    type Change = fn(&mut Hold);
    let rows: [(&str, Change, [&str; 10]); 13] = [
        ("of", |_| {}, HOLDS),
        (
            "pause",
            |h| {
                h.pause(false);
            },
            ["p-", "p-", "pR", "pS", "pr", "ps", "pR", "pS", "pr", "ps"],
        ),
        (
            "pause still",
            |h| {
                h.pause(true);
            },
            ["p-", "p-", "pR", "pS", "pr", "ps", "pR", "pS", "pr", "ps"],
        ),
        ("pause by", |h| h.pause_by("x"), ["p-", "p-", "pR", "pS", "pr", "ps", "pR", "pS", "pr", "ps"]),
        (
            "unpause",
            |h| {
                h.unpause();
            },
            ["--", "--", "-R", "-S", "-r", "-s", "-R", "-S", "-r", "-s"],
        ),
        ("free", Hold::free, ["--"; 10]),
        ("found still", Hold::found_still, ["p-", "p-", "-R", "pS", "-r", "ps", "pR", "pS", "pr", "ps"]),
        ("found running", Hold::found_running, ["--", "--", "-R", "-S", "-r", "-s", "-R", "-S", "-r", "-s"]),
        (
            "stall",
            |h| {
                h.stall(Want::Frames, "again".to_owned());
            },
            ["-R", "pR", "-R", "-S", "-R", "-R", "pR", "pS", "pR", "pR"],
        ),
        ("stood before", Hold::stood_before, ["--", "p-", "-S", "-S", "-s", "-s", "pS", "pS", "ps", "ps"]),
        ("ran in stall", Hold::ran_in_stall, HOLDS),
        ("ease", |h| h.ease(Want::Frames), ["--", "p-", "-r", "-s", "-r", "-s", "pr", "ps", "pr", "ps"]),
        ("end stall", Hold::end_stall, ["--", "p-", "-R", "-S", "--", "--", "pR", "pS", "p-", "p-"]),
    ];
    for (event, change, expected) in rows {
        for (before, after) in HOLDS.into_iter().zip(expected) {
            let mut hold = hold(before);
            change(&mut hold);
            assert_eq!(word(&hold), after, "{event} of {before}");
        }
    }
}

#[test]
fn a_vm_goes_on_only_by_who_may_let_it() {
    const NOT_PAUSED: [&str; 5] = ["--", "-R", "-S", "-r", "-s"];
    let allowed: [(Resumer, usize, &[&str]); 6] = [
        (Resumer::Operator, HERE, &HOLDS),
        (Resumer::Store, HERE, &["-r"]),
        (Resumer::Source { stopped_it: true }, MIGRATING, &["--"]),
        (Resumer::Source { stopped_it: true }, IN_DOUBT, &["--"]),
        (Resumer::Target, HERE, &NOT_PAUSED),
        (Resumer::Checkpoint { stopped_it: true }, HERE, &["--"]),
    ];
    let all = [
        Resumer::Operator,
        Resumer::Store,
        Resumer::Source { stopped_it: true },
        Resumer::Source { stopped_it: false },
        Resumer::Target,
        Resumer::Checkpoint { stopped_it: true },
        Resumer::Checkpoint { stopped_it: false },
    ];
    for who in all {
        for (at, whereabouts) in whereabouts().iter().enumerate() {
            for name in HOLDS {
                let row = allowed.iter().find(|(other, place, _)| (*other, *place) == (who, at));
                let expected = row.is_some_and(|(_, _, holds)| holds.contains(&name));
                assert_eq!(
                    may_resume(who, whereabouts, &hold(name)),
                    expected,
                    "{who:?} {whereabouts:?} {name}"
                );
            }
        }
    }
}

#[test]
fn only_a_vm_that_is_here_can_be_worked_with() {
    for (at, whereabouts) in whereabouts().iter().enumerate() {
        assert_eq!(whereabouts.elsewhere("db").is_none(), at == HERE, "{whereabouts:?}");
    }
}

#[test]
fn whoever_paused_it_first_is_named() {
    for (name, stood, already, by) in [
        ("--", false, false, BY_VMEMD),
        ("--", true, true, BY_ITS_MONITOR),
        ("-R", true, false, BY_VMEMD),
        ("-S", true, false, BY_VMEMD),
        ("pR", true, false, BY_VMEMD),
    ] {
        let mut hold = hold(name);
        assert_eq!((hold.pause(stood), hold.paused()), (already, Some(by)), "{name} {stood}");
    }
    let mut came = Hold::Paused(AS_IT_CAME);
    assert!(came.pause(true));
    assert_eq!(came, Hold::Paused(AS_IT_CAME));
    assert!(!came.pause(false));
    assert_eq!(came, Hold::Paused(BY_VMEMD));
}

/// A checkpoint's pause comes between a stall and the pause for it: the VM is found still, by vmemd's own doing.
#[test]
fn a_vm_that_a_checkpoint_stopped_first_goes_on_behind_its_stall() {
    for begins in ["--", "-s"] {
        let mut hold = hold(begins);
        assert!(hold.stall(Want::Frames, "full".to_owned()));
        hold.ran_in_stall();
        hold.stood_before();
        assert_eq!(word(&hold), "-R", "{begins}");
        hold.ease(Want::Frames);
        assert!(may_resume(Resumer::Store, &Whereabouts::Here, &hold), "{begins}");
        // The mark is of one stall.
        assert!(hold.stall(Want::Frames, "full again".to_owned()));
        hold.stood_before();
        assert_eq!(word(&hold), "-S", "{begins}");
    }
    // What is known to have stood still before did not run.
    let mut still = hold("-S");
    still.ran_in_stall();
    still.stood_before();
    assert_eq!(word(&still), "-S");
}

#[test]
fn a_user_who_pauses_what_a_checkpoint_is_to_stop_keeps_it_so() {
    let mut hold = Hold::Paused(FOR_ITS_CHECKPOINT);
    assert!(hold.pause(true));
    assert_eq!(hold, Hold::Paused(BY_VMEMD));
}

#[test]
fn a_stall_for_two_reasons_ends_with_the_second() {
    let mut hold = hold("-R");
    assert!(!hold.stall(Want::Pages, "silent".to_owned()));
    assert_eq!(hold.stall_reason().unwrap().matches("; it goes on by itself").count(), 2);
    hold.ease(Want::Pages);
    assert!(!hold.is_relieved() && hold.stall_reason().unwrap().starts_with("full;"));
    hold.ease(Want::Frames);
    assert!(hold.is_relieved());
    // A new one begins from the start.
    assert!(hold.stall(Want::Pages, "silent".to_owned()));
    assert!(hold.stall_reason().unwrap().starts_with("silent;"));
}
