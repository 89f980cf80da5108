//! Hosts that may send VMs here, and users who may control them, are let in; all others are refused, and logged once.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;
#[path = "qemu/network.rs"]
mod network;
#[path = "../migrate/tests/common/pki.rs"]
mod pki;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use common::{Host, Running, Said, needs_root, needs_vms, wait_for};
use network::Network;
use pki::{Ca, When, show};
use testkit::{OrSkip, Reason, skip};

const GUEST: &str = "rewrite:working-set=40M,rate=400M";
/// Another user, without any rights.
const NOBODY: u32 = 65534;

/// The number of refusals in the log with these words.
fn told(log: &str, words: &str) -> usize {
    log.lines().filter(|line| line.contains("refused:") && line.contains(words)).count()
}

/// Waits until such a refusal is in the log, and checks that it is there once.
fn told_once(daemon: &Running, words: &str) {
    wait_for(words, || (told(&daemon.log(), words) > 0).then_some(()));
    assert_eq!(told(&daemon.log(), words), 1, "{}", daemon.log());
}

fn migrate(host: &Host, to: &str, more: &[&str]) -> Said {
    host.vmemd(&[&["migrate", "web", "--to", to, "--json"], more].concat())
}

/// The certificates of one host of a CA of the tests, as files.
fn files(host: &Host, name: &str, ca: &Ca, when: When) -> String {
    let made = ca.host("127.0.0.1", when);
    let dir = host.root.join(name);
    fs::create_dir_all(&dir).expect("a directory");
    for (file, text) in [("ca.crt", &made.ca), ("host.crt", &made.cert), ("host.key", &made.key)] {
        fs::write(dir.join(file), text).expect("a file");
    }
    dir.display().to_string()
}

#[test]
fn strangers_cannot_send_vms() {
    needs_vms();
    let mut host = Host::new("strangers");
    let (ca, strangers) = (Ca::new(), Ca::new());
    let ours = files(&host, "ours", &ca, When::Now);
    let (daemon, address) = host.start_daemon("127.0.0.1:0", "64M", &["--tls", &ours]);
    let to: SocketAddr = address.parse().expect("an address");
    let mut run = host.start_vm("web", GUEST);

    for _ in 0..3 {
        // Those who look at nothing before they show what they have.
        show(to, &ca, Some(&strangers.host("127.0.0.1", When::Now))).unwrap_err();
        show(to, &ca, Some(&ca.host("127.0.0.1", When::TillYesterday))).unwrap_err();
        show(to, &ca, None).unwrap_err();
        // A source without TLS hears what to do, and its VM runs on.
        migrate(&host, &address, &[]).fails(6, &["--tls DIR", "runs on here"]);
    }
    told_once(&daemon, "its certificate is not of the CA");
    told_once(&daemon, "its certificate has expired");
    told_once(&daemon, "it shows no certificate");
    told_once(&daemon, "it speaks no TLS");
    // A source of another CA does not even ask.
    let theirs = files(&host, "theirs", &strangers, When::Now);
    migrate(&host, &address, &["--tls", &theirs]).fails(6, &["is not of the CA", "runs on here"]);
    migrate(&host, &address, &["--tls", &ours, "--tls-name", "other.example"]).fails(6, &["other.example"]);
    let expired = files(&host, "expired", &ca, When::TillYesterday);
    migrate(&host, &address, &["--tls", &expired]).fails(2, &["host.crt", "has expired"]);
    let serve = ["serve", "--listen", "127.0.0.1:0", "--ram", "64M", "--store", &host.store()];
    host.vmemd(&[serve.as_slice(), &["--tls", &expired]].concat()).fails(2, &["host.crt", "has expired"]);
    // A daemon without TLS, asked by TLS.
    let (plain, without) = host.start_daemon("127.0.0.1:0", "64M", &[]);
    migrate(&host, &without, &["--tls", &ours]).fails(6, &["does not speak TLS", "runs on here"]);
    told_once(&plain, "it speaks TLS");

    host.wait_rounds("web", 1);
    let moved = migrate(&host, &address, &["--tls", &ours]);
    assert_eq!(moved.code, 0, "{moved:?}");
    run.ends_with(10);
    host.wait_rounds("web", 2);
    let nothing_new = told(&daemon.log(), "");
    assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
    wait_for("the VM to end", || host.sockets().is_empty().then_some(()));
    assert_eq!(told(&daemon.log(), ""), nothing_new, "{}", daemon.log());
    assert!(!daemon.log().contains("PRIVATE"), "{}", daemon.log());
}

#[test]
fn only_hosts_on_the_list_may_come() {
    needs_vms();
    let mut host = Host::new("allowed");
    let certificates = host.pki("pki", &["127.0.0.1", "a.example", "b.example,192.0.2.9"]);
    let [target, a, b] = certificates.as_slice() else { panic!("{certificates:?}") };
    let (daemon, address) =
        host.start_daemon("127.0.0.1:0", "64M", &["--tls", target, "--allow-peer", "c.example,192.0.2.9"]);
    let mut run = host.start_vm("web", GUEST);
    for _ in 0..2 {
        migrate(&host, &address, &["--tls", a]).fails(6, &["--allow-peer", "runs on here"]);
    }
    told_once(&daemon, "--allow-peer");
    let moved = migrate(&host, &address, &["--tls", b]);
    assert_eq!(moved.code, 0, "{moved:?}");
    run.ends_with(10);
    host.wait_rounds("web", 1);
}

#[test]
fn certificates_are_renewed_without_a_restart() {
    let mut host = Host::new("renewed");
    let [old, new] = [Ca::new(), Ca::new()];
    let ours = files(&host, "ours", &old, When::Now);
    let (daemon, address) = host.start_daemon("127.0.0.1:0", "64M", &["--tls", &ours]);
    let to: SocketAddr = address.parse().expect("an address");
    let let_in = |ca: &Ca| show(to, ca, Some(&ca.host("127.0.0.1", When::Now))).is_ok();
    assert!(let_in(&old) && !let_in(&new));
    // Half of it is there: those of before are used.
    fs::write(Path::new(&ours).join("host.crt"), new.host("127.0.0.1", When::Now).cert).expect("a file");
    assert!(let_in(&old) && let_in(&old) && !let_in(&new));
    told_once(&daemon, "those of before are used");
    files(&host, "ours", &new, When::Now);
    assert!(let_in(&new) && !let_in(&old));
}

#[test]
fn greetings_by_tls_are_few_and_bounded_in_time() {
    let mut host = Host::new("greetings");
    let ours = host.pki("pki", &["127.0.0.1"]).remove(0);
    let (daemon, address) = host.start_daemon("127.0.0.1:0", "64M", &["--tls", &ours]);
    // So many that say that they speak TLS, and then nothing.
    let silent: Vec<TcpStream> = (0..40)
        .map(|_| {
            let mut stream = TcpStream::connect(&address).expect("it listens");
            stream.write_all(&[0x16]).expect("it listens");
            stream
        })
        .collect();
    told_once(&daemon, "32 connections have not said");
    // They make room for others by themselves.
    told_once(&daemon, "too long to prove");
    drop(silent);
    let mut host_with_vm = Host::new("greetings-vm");
    needs_vms();
    let _run = host_with_vm.start_vm("web", GUEST);
    let moved = migrate(&host_with_vm, &address, &["--tls", &ours]);
    assert_eq!(moved.code, 0, "{moved:?}");
}

#[test]
fn between_two_hosts_vms_move_by_tls_or_by_explicit_wish() {
    needs_vms();
    needs_root("a network namespace");
    let network = Network::new().or_skip(Reason::Netns);
    let [mut here, mut there] =
        [0, 1].map(|side| Host::within(["net-a", "net-b"][side], &network.namespaces[side]));
    let certificates = here.pki("pki", &Network::HOSTS);
    let tls = [0, 1].map(|side| ["--tls", certificates[side].as_str()]);
    let listen = Network::HOSTS.map(|host| format!("{host}:0"));
    let store = there.store();
    there
        .vmemd(&["serve", "--listen", &listen[1], "--ram", "64M", "--store", &store])
        .fails(2, &["--tls DIR", "--plain"]);
    let (_there_daemon, there_address) = there.start_daemon(&listen[1], "64M", &tls[1]);
    let (_here_daemon, here_address) = here.start_daemon(&listen[0], "64M", &tls[0]);
    let (_plain_daemon, plain_address) = there.start_daemon(&listen[1], "64M", &["--plain"]);
    let mut run = here.start_vm("web", GUEST);
    here.wait_rounds("web", 1);
    for to in [&there_address, &plain_address] {
        migrate(&here, to, &[]).fails(2, &["unencrypted", "--tls DIR", "--plain", "runs on here"]);
    }
    let moved = migrate(&here, &there_address, &[&tls[0][..], &["--check-placement"]].concat());
    assert_eq!(moved.code, 0, "{moved:?}");
    assert!(moved.json()["placement"]["touched_pages"].as_u64() > Some(0), "{moved:?}");
    run.ends_with(10);
    there.wait_rounds("web", 2);
    let moved = migrate(&there, &here_address, &tls[1]);
    assert_eq!(moved.code, 0, "{moved:?}");
    here.wait_rounds("web", 2);
    wait_for("the VM there to end", || there.sockets().is_empty().then_some(()));
    let moved = migrate(&here, &plain_address, &["--plain"]);
    assert_eq!(moved.code, 0, "{moved:?}");
    there.wait_rounds("web", 1);
    assert_eq!(there.vmemd(&["stop", "web"]).code, 0);
    wait_for("the VM to end", || (here.sockets().is_empty() && there.sockets().is_empty()).then_some(()));
}

/// Asks a control socket as another user, and returns the answer.
fn ask_as(uid: u32, path: &Path) -> std::io::Result<String> {
    let path = path.to_owned();
    let asking = std::thread::spawn(move || {
        // SAFETY: changes the user of this thread alone, which ends right after.
        let changed = unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) };
        assert_eq!(changed, 0, "{}", std::io::Error::last_os_error());
        let mut stream = UnixStream::connect(&path)?;
        // Who is refused may be hung up on before he has asked; the answer is there all the same.
        let _ = stream.write_all(b"{\"op\":\"stop\"}\n");
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        Ok(line)
    });
    asking.join().expect("an answer or an error")
}

#[test]
fn another_users_process_cannot_control_a_vm() {
    needs_vms();
    needs_root("being another user");
    let mut host = Host::new("users");
    let run = host.start_vm("web", "idle");
    let (dir, socket) = (host.run_dir(), host.run_dir().join("web.sock"));
    let mode = |path: &Path| fs::metadata(path).expect("it is there").mode() & 0o777;
    assert_eq!((mode(&dir), mode(&socket)), (0o700, 0o600));
    // The command itself, as another user: its file may be where that user cannot go.
    let binary = fs::File::open(env!("CARGO_BIN_EXE_vmemd")).expect("the binary");
    let mut stat = Command::new(format!("/proc/self/fd/{}", binary.as_raw_fd()));
    stat.args(["stat", "web", "--run-dir"]).arg(&dir).uid(NOBODY).gid(NOBODY);
    let fd = binary.as_raw_fd();
    // SAFETY: between fork and exec only this one async-signal-safe call is made, which touches no memory.
    unsafe {
        stat.pre_exec(move || {
            if libc::fcntl(fd, libc::F_SETFD, 0) == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        })
    };
    let output = stat.output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains("Permission denied"), "{said}");
    assert_eq!(ask_as(NOBODY, &socket).unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
    // Somebody has opened all doors: the VM still asks who is there.
    for dir in host.root.ancestors().chain([dir.as_path()]) {
        if mode(dir) & 0o001 == 0 {
            if !dir.starts_with(&host.root) {
                skip(Reason::Users, format_args!("{} is closed to others", dir.display()));
            }
            fs::set_permissions(dir, fs::Permissions::from_mode(0o711)).expect("a mode");
        }
    }
    fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).expect("a mode");
    for _ in 0..3 {
        let answer = ask_as(NOBODY, &socket).expect("an answer");
        assert!(answer.contains("error") && answer.contains("user 65534 may not"), "{answer}");
    }
    told_once(&run, "another user");
    let other = ask_as(NOBODY - 1, &socket).expect("an answer");
    assert!(other.contains("error"), "{other}");
    wait_for("the other's refusal", || (told(&run.log(), "another user") > 1).then_some(()));
    assert_eq!(told(&run.log(), "another user"), 2, "{}", run.log());
    // Its own user is served as ever.
    assert_eq!(host.stat("web").expect("it runs")["state"], "running");
    // And a directory that others may write to is not used at all.
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).expect("a mode");
    host.vmemd(&["list"]).fails(3, &["chmod 700", "--run-dir"]);
    fs::set_permissions(&dir, fs::Permissions::from_mode(0o700)).expect("a mode");
    assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
}

#[test]
fn a_ca_for_tests_is_made_once_and_has_its_keys_for_itself() {
    let host = Host::new("pki");
    let dirs = host.pki("pki", &["a.example,192.0.2.1", "::1"]);
    let (ca, root) = (host.root.join("pki"), host.root.join("pki").display().to_string());
    let mode = |path: &Path| fs::metadata(path).expect("it is there").mode() & 0o777;
    assert_eq!((mode(&ca), mode(&ca.join("ca.key"))), (0o700, 0o600));
    for dir in dirs.iter().map(Path::new) {
        assert_eq!((mode(dir), mode(&dir.join("host.key"))), (0o700, 0o600));
        assert_eq!(fs::read(dir.join("ca.crt")).expect("a CA"), fs::read(ca.join("ca.crt")).expect("a CA"));
    }
    let key = fs::read(ca.join("ca.key")).expect("a key");
    host.vmemd(&["pki", "init", &root, "--host", "b.example"]).fails(2, &["ca.key", "not overwritten"]);
    host.vmemd(&["pki", "issue", &root, "--host", "a.example"]).fails(2, &["a.example", "not overwritten"]);
    let more =
        host.vmemd(&["pki", "issue", &root, "--host", "b.example", "--host", "c.example", "--days", "1"]);
    assert_eq!(more.code, 0, "{more:?}");
    assert_eq!(fs::read(ca.join("ca.key")).expect("a key"), key);
    // A CA of somebody else's is not signed for.
    fs::write(ca.join("ca.crt"), &Ca::new().pem).expect("a file");
    host.vmemd(&["pki", "issue", &root, "--host", "d.example"])
        .fails(2, &["is not a CA of `vmemd pki init`"]);
    assert!(!ca.join("d.example").exists());
}
