//! With a server that speaks S3 (`scripts/setup --s3` installs one): a process of its own, whose memory is the store.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::Child;

use testkit::{Reason, skip};

use super::*;

struct Server {
    child: Child,
    endpoint: String,
}

impl Server {
    fn start() -> Server {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/s3/bin/moto_server");
        if !program.exists() {
            skip(Reason::Tools, "no S3 server: scripts/setup --s3 installs one");
        }
        // Free a moment later; the server says if somebody else has taken it.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut command = Command::new(program);
        command.args(["-H", "127.0.0.1", "-p", &port.to_string()]).stdout(Stdio::null());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
        let up = said.by_ref().map_while(Result::ok).any(|line| line.contains("Running on"));
        assert!(up, "the S3 server has ended");
        std::thread::spawn(move || said.for_each(drop));
        Server { child, endpoint: format!("http://127.0.0.1:{port}") }
    }

    fn vmemd(&self, place: &Place, args: &[&str]) -> Command {
        let mut command = place.vmemd(args);
        command
            .env("AWS_ACCESS_KEY_ID", "test")
            .env("AWS_SECRET_ACCESS_KEY", "test")
            .env("AWS_REGION", "us-east-1")
            .env("AWS_ENDPOINT", &self.endpoint)
            .env("AWS_ALLOW_HTTP", "true");
        command
    }

    fn say(&self, place: &Place, args: &[&str]) -> Output {
        self.vmemd(place, args).output().unwrap()
    }

    /// What the server says to a request without a body, which it takes from anybody.
    fn ask(&self, method: &str, path: &str) -> String {
        let address = self.endpoint.strip_prefix("http://").unwrap();
        let mut link = std::net::TcpStream::connect(address).unwrap();
        let head = format!("{method} {path} HTTP/1.0\r\nHost: {address}\r\nContent-Length: 0\r\n\r\n");
        link.write_all(head.as_bytes()).unwrap();
        let mut said = Vec::new();
        link.read_to_end(&mut said).unwrap();
        String::from_utf8_lossy(&said).into_owned()
    }

    fn with_bucket() -> Server {
        let server = Server::start();
        assert!(server.ask("PUT", "/backups").contains(" 200 "));
        server
    }

    /// Neither an object nor a part of one is there.
    fn is_empty(&self) {
        let (objects, uploads) = (self.ask("GET", "/backups"), self.ask("GET", "/backups?uploads"));
        assert!(!objects.contains("<Key>") && !uploads.contains("<Key>"), "{objects} {uploads}");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const URL: &str = "s3://backups/web/monday";

#[test]
fn a_checkpoint_goes_into_an_object_store_and_comes_back() {
    let server = Server::with_bucket();
    let place = Place::new();
    is(&server.say(&place, &["export", &place.text("from"), URL]), 0, "disk root");
    is(&server.say(&place, &["export", &place.text("from"), URL]), 4, "is there already");
    is(&server.say(&place, &["import", URL, "--to", &place.text("to")]), 0, "");
    is(&place.say(&["verify", &place.text("to")]), 0, "");
    assert!(!server.ask("GET", "/backups?uploads").contains("<Key>"));
}

#[test]
fn each_failure_of_a_store_has_its_words_and_leaves_nothing() {
    let server = Server::with_bucket();
    let place = Place::new();
    let from = place.text("from");
    let to = place.text("to");
    is(&place.say(&["export", &from, URL]), 2, "no credentials");
    is(&place.say(&["export", &from, "s3://backups"]), 2, "is no s3://BUCKET/KEY");
    is(&server.say(&place, &["export", &from, "s3://nowhere/web"]), 4, "no such bucket");
    is(&server.say(&place, &["import", URL, "--to", &to]), 4, "there is no such object");
    let mut gone = server.vmemd(&place, &["export", &from, URL]);
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    is(
        &gone.env("AWS_ENDPOINT", format!("http://127.0.0.1:{port}")).output().unwrap(),
        6,
        "cannot be reached",
    );

    // A page that turns out damaged when parts are there already.
    make(&place.path("bad"), "web", 3);
    let entry = Archive::open(&place.path("bad")).unwrap().find(None).unwrap();
    let image = File::options().write(true).open(entry.path().join("memory.img")).unwrap();
    image.write_all_at(b"otherwise", bytes_of(PAGES - 1)).unwrap();
    is(&server.say(&place, &["export", &place.text("bad"), URL]), 13, "is damaged");
    server.is_empty();
    assert!(server.ask("PUT", "/backups/rubbish").contains(" 200 "));
    is(&server.say(&place, &["import", "s3://backups/rubbish", "--to", &to]), 13, "is no stream");
    is_empty(&place.path("to"));
}

#[test]
fn an_upload_that_is_interrupted_leaves_no_parts() {
    let server = Server::with_bucket();
    let place = Place::new();
    let signal = |pid: u32, signal| {
        let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    };
    // An upload may be faster than this test.
    for nth in 0..5 {
        let key = format!("web/{nth}");
        let mut export =
            server.vmemd(&place, &["export", &place.text("from"), &format!("s3://backups/{key}")]);
        let mut export = export.stderr(Stdio::piped()).spawn().unwrap();
        common::wait_for("an upload to be under way", || {
            let ended = export.try_wait().unwrap().is_some();
            (ended || server.ask("GET", "/backups?uploads").contains(&key)).then_some(())
        });
        signal(server.child.id(), rustix::process::Signal::STOP);
        if export.try_wait().unwrap().is_none() {
            signal(export.id(), rustix::process::Signal::TERM);
        }
        signal(server.child.id(), rustix::process::Signal::CONT);
        let said = export.wait_with_output().unwrap();
        assert!(!server.ask("GET", "/backups?uploads").contains("<Key>"), "{said:?}");
        if said.status.success() {
            continue;
        }
        is(&said, 130, "interrupted");
        assert!(!server.ask("GET", "/backups").contains(&key));
        return;
    }
    panic!("each upload has ended before it could be interrupted");
}
