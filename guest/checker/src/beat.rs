//! Signs of life: counted lines on the console, and a TCP server that sends back what it gets.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::arguments::Failure;
use crate::differences::Mismatched;

const INTERVAL: Duration = Duration::from_millis(100);

/// Prints a line every 100 ms, for ever. A guest that was paused goes on with the next number, and does not catch up.
pub(crate) fn beat() -> Result<Mismatched, Failure> {
    let started = Instant::now();
    for number in 0_u64.. {
        println!("checker beat number={number} us={}", started.elapsed().as_micros());
        std::thread::sleep(INTERVAL);
    }
    Ok(0)
}

/// Serves any number of connections, for ever.
pub(crate) fn echo(port: u16) -> Result<Mismatched, Failure> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    println!("checker echo listening port={port}");
    for stream in listener.incoming() {
        let stream = stream?;
        std::thread::spawn(move || serve(stream));
    }
    Ok(0)
}

fn serve(mut stream: TcpStream) {
    let mut buffer = [0; 4096];
    // An error is not reported here: the other end notices that bytes are missing.
    let _ = stream.set_nodelay(true);
    while let Ok(count @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}
