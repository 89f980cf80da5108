//! Bad input of every kind ends with one clear error that says what to do and with the right exit code, and leaves
//! nothing behind.

#[macro_use]
extern crate testkit;

testkit::main!();

mod common;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;

use common::{Host, needs_vms, wait_for};
use testkit::{Reason, skip};

const GUEST: &str = "rewrite:working-set=40M,rate=400M";

#[test]
fn numbers_and_names_that_make_no_sense() {
    let host = Host::new("usage");
    let run = |args: &str| host.vmemd(&args.split(' ').collect::<Vec<_>>());
    run("run --name a/b --memory 64M").fails(2, &["a/b", "letters"]);
    run("run --name .a --memory 64M").fails(2, &["dot"]);
    run("run --name x --memory 3").fails(2, &["multiple of 2M"]);
    run("run --name x --memory 64X").fails(2, &["4G"]);
    run("run --name x --memory 64M --ram 65M").fails(2, &["more than the VM's memory of 64M"]);
    run("run --name x --memory 64M --ram 4M").fails(2, &["minimum of 16M"]);
    run("run --name x --memory 64M --guest explode").fails(2, &["explode", "rewrite"]);
    run("migrate x --to").fails(2, &["--to"]);
    run("migrate x --to h:1 --downtime-target 50").fails(2, &["50ms"]);
    run("migrate x --to h:1 --streams 0").fails(2, &["--streams"]);
    run("serve --listen nowhere --ram 64M --store /tmp").fails(2, &["ADDRESS:PORT"]);
    run("serve --listen 127.0.0.1:0 --ram 1M --store /tmp").fails(2, &["minimum of 16M"]);
    for beyond in ["0.0.0.0:0", "[::]:0", "192.0.2.1:7070"] {
        run(&format!("serve --listen {beyond} --ram 64M --store /tmp")).fails(2, &["--tls DIR", "--plain"]);
    }
    run("serve --listen 127.0.0.1:0 --ram 64M --store /tmp --tls /nowhere")
        .fails(2, &["ca.crt", "vmemd pki"]);
    run("serve --listen 127.0.0.1:0 --ram 64M --store /tmp --tls /nowhere --plain").fails(2, &["--plain"]);
    run("serve --listen 127.0.0.1:0 --ram 64M --store /tmp --allow-peer a").fails(2, &["--tls"]);
    run("migrate web --to 127.0.0.1:1 --tls /nowhere").fails(2, &["ca.crt", "vmemd pki"]);
    for name in ["..", "../x", "/tmp/x", "a/b", ""] {
        run(&format!("pki init /nowhere/pki --host a,{name}")).fails(2, &["no name or address"]);
    }
    run("pki issue /nowhere/pki --host a").fails(1, &["ca.key", "vmemd pki init"]);
    run("receive {}").fails(2, &["vmemd serve"]);
    run("fly").fails(2, &["fly"]);
    host.assert_clean();
}

#[test]
fn more_ram_than_the_host_has() {
    let host = Host::new("ram");
    let store = host.store();
    let run = host.vmemd(&["run", "--name", "x", "--memory", "4096T", "--store", &store]);
    run.fails(5, &["RAM", "free", "--ram"]);
    let serve = host.vmemd(&["serve", "--listen", "127.0.0.1:0", "--ram", "4096T", "--store", &store]);
    serve.fails(5, &["4096T", "more than this host has"]);
    host.assert_clean();
}

#[test]
fn a_working_set_that_does_not_fit() {
    needs_vms();
    let host = Host::new("working-set");
    let store = host.store();
    let args =
        ["run", "--name", "x", "--memory", "64M", "--guest", "rewrite:working-set=64M", "--store", &store];
    host.vmemd(&args).fails(2, &["working set", "smaller"]);
    host.assert_clean();
}

#[test]
fn a_store_that_is_too_small_or_none() {
    needs_vms();
    let host = Host::new("store");
    let args = ["run", "--name", "x", "--memory", "900T", "--ram", "16M", "--guest", "idle", "--store"];
    let with = |store: &str| host.vmemd(&[&args[..], &[store]].concat());
    let too_small = with(&host.store());
    assert!([2, 5].contains(&too_small.code), "{too_small:?}");
    let file = host.root.join("file");
    std::fs::write(&file, "not a store").expect("a file");
    let args = ["run", "--name", "x", "--memory", "64M", "--ram", "16M", "--guest", "idle", "--store"];
    let with = |store: &str| host.vmemd(&[&args[..], &[store]].concat());
    let no_store = with(&file.display().to_string());
    assert_eq!(no_store.code, 2, "{no_store:?}");
    assert!(no_store.err.contains("file"), "{no_store:?}");
    // No file can be made there, and no room either.
    with("/proc").fails(3, &["/proc"]);
    let no_dir = with("/proc/nowhere");
    assert_ne!(no_dir.code, 0, "{no_dir:?}");
    assert!(no_dir.err.contains("--store"), "{no_dir:?}");
    host.assert_clean();
}

#[test]
fn no_such_vm() {
    let host = Host::new("unknown");
    for args in [
        &["stat", "web"][..],
        &["stat", "web", "--watch"],
        &["set", "web", "--ram", "64M"],
        &["pause", "web"],
        &["resume", "web"],
        &["stop", "web"],
        &["migrate", "web", "--to", "127.0.0.1:1"],
    ] {
        host.vmemd(args).fails(4, &["no VM named \"web\""]);
    }
    assert!(host.names().is_empty());
}

#[test]
fn a_run_directory_that_is_none() {
    let host = Host::new("run-dir");
    let file = host.root.join("file");
    std::fs::write(&file, "").expect("a file");
    let said = host.vmemd(&["list", "--run-dir", &file.display().to_string()]);
    assert_ne!(said.code, 0);
    assert!(said.err.contains("--run-dir"), "{said:?}");
}

#[test]
fn a_name_that_is_taken_and_one_whose_process_died() {
    needs_vms();
    let mut host = Host::new("name");
    let store = host.store();
    let mut run = host.start_vm("web", GUEST);
    let again = ["run", "--name", "web", "--memory", "64M", "--store", &store];
    host.vmemd(&again).fails(4, &["web", "taken"]);
    run.signal(libc::SIGKILL);
    run.end();
    assert_eq!(host.sockets(), ["web.sock"]);
    host.vmemd(&["stat", "web"]).fails(4, &["no VM named"]);
    assert!(host.sockets().is_empty());
    let mut run = host.start_vm("web", GUEST);
    assert_eq!(host.vmemd(&["stop", "web"]).code, 0);
    run.ends_with(0);
    host.assert_clean();
}

#[test]
fn targets_that_are_not_there_or_speak_rubbish() {
    needs_vms();
    let mut host = Host::new("peer");
    let _run = host.start_vm("web", GUEST);
    // A port that nobody listens on.
    let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port");
    host.vmemd(&["migrate", "web", "--to", &free.to_string()]).fails(6, &["cannot reach", "runs on here"]);
    host.vmemd(&["migrate", "web", "--to", "no such host"]).fails(6, &["runs on here"]);
    let answers: [&[u8]; 3] = [
        b"HTTP/1.1 400 Bad Request\r\n\r\nthis is a web server and no daemon, whatever you wanted\r\n",
        &[0xff; 4096],
        b"",
    ];
    for answer in answers {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address").to_string();
        let peer = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a connection");
            let mut some = [0; 16];
            let _ = stream.read(&mut some);
            let _ = stream.write_all(answer);
        });
        host.vmemd(&["migrate", "web", "--to", &address]).fails(6, &["runs on here"]);
        peer.join().expect("the peer");
        host.wait_rounds("web", 1);
    }
    assert_eq!(host.wait_state("web", "running")["migration"], serde_json::Value::Null);
}

#[test]
fn a_target_without_room_or_with_the_name_taken() {
    needs_vms();
    let mut host = Host::new("room");
    let mut target = Host::new("room-target");
    let (_daemon, address) = target.start_daemon("127.0.0.1:0", "64M", &[]);
    let _run = host.start_vm("web", GUEST);
    let with = |ram: &str| host.vmemd(&["migrate", "web", "--to", &address, "--ram", ram]);
    with("100M").fails(5, &["64M", "--ram", "runs on here"]);
    let above = with("200M");
    assert_eq!(above.code, 2, "{above:?}");
    let below = with("4M");
    assert!([2, 6].contains(&below.code) && below.err.contains("16M"), "{below:?}");
    let _other = target.start_vm("web", "idle");
    host.vmemd(&["migrate", "web", "--to", &address]).fails(4, &["web", "taken", "runs on here"]);
    host.wait_rounds("web", 1);
    assert_eq!(target.sockets(), ["web.sock"]);
}

#[test]
fn a_daemon_survives_rubbish_silence_and_truncation() {
    needs_vms();
    let mut host = Host::new("hostile");
    let (daemon, address) = host.start_daemon("127.0.0.1:0", "64M", &[]);
    let mut silent: Vec<TcpStream> = Vec::new();
    for rubbish in [&b"GET / HTTP/1.0\r\n\r\n"[..], &[0; 3], &[0xff; 100_000], b""] {
        let mut stream = TcpStream::connect(&address).expect("the daemon listens");
        let _ = stream.write_all(rubbish);
        silent.push(stream);
    }
    silent.truncate(2);
    let _run = host.start_vm("web", GUEST);
    let moved = host.vmemd(&["migrate", "web", "--to", &address]);
    assert_eq!(moved.code, 0, "{moved:?}\n{}", daemon.log());
    host.wait_rounds("web", 1);
}

#[test]
fn a_control_socket_survives_rubbish_and_crowds() {
    needs_vms();
    let mut host = Host::new("crowd");
    let _run = host.start_vm("web", GUEST);
    let path = host.run_dir().join("web.sock");
    let mode =
        std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).expect("a socket").permissions());
    assert_eq!(mode & 0o777, 0o600);
    for rubbish in [&b"\n"[..], b"{}\n", b"{\"op\":\"fly\"}\n", &[b'x'; 100_000]] {
        let mut stream = UnixStream::connect(&path).expect("the VM listens");
        let _ = stream.write_all(rubbish);
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        assert!(answer.contains("usage"), "{answer}");
    }
    let crowd: Vec<UnixStream> =
        (0..80).map(|_| UnixStream::connect(&path).expect("the VM listens")).collect();
    drop(crowd);
    wait_for("room in the crowd", || host.stat("web"));
}

#[test]
fn a_store_without_o_direct() {
    needs_vms();
    let host = Host::new("o-direct");
    let refuses = |dir: &&str| {
        let probe = std::path::Path::new(dir).join(format!("vmemd-probe-{}", std::process::id()));
        let opened = std::os::unix::fs::OpenOptionsExt::custom_flags(
            std::fs::File::options().write(true).create(true).truncate(true),
            libc::O_DIRECT,
        )
        .open(&probe);
        let _ = std::fs::remove_file(&probe);
        opened.is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL))
    };
    let Some(dir) = ["/dev/shm", "/run", "/tmp"].into_iter().find(refuses) else {
        skip(Reason::Kernel, "every file system here offers O_DIRECT");
    };
    let said = host.vmemd(&[
        "run",
        "--name",
        "x",
        "--memory",
        "64M",
        "--ram",
        "16M",
        "--store-in-ram",
        "--store",
        dir,
    ]);
    assert!([3, 5].contains(&said.code), "{said:?}");
    assert!(said.err.contains("O_DIRECT"), "{said:?}");
    host.assert_clean();
}
