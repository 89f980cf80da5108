//! A TCP stream whose content is a function of the offset: the host sends, the guest verifies and answers what it
//! found.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crate::arguments::Failure;
use crate::content::{self, PAGE, STREAM};
use crate::differences::{Differences, Mismatched};
use crate::pages::PageBuffer;

/// Bytes that are sent and received at once.
const PIECE: usize = 1 << 20;
/// Bytes between two lines of the receiver.
const SAY_EVERY: u64 = 64 << 20;

/// Bytes of the receiver's answer at the end of the stream: received bytes and mismatched pages, 64 bits each,
/// little-endian.
const ANSWER: usize = 16;

/// Receives one stream.
pub(crate) fn receive(port: u16) -> Result<Mismatched, Failure> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    println!("checker stream listening port={port}");
    let (mut sender, _) = listener.accept()?;
    let mut buffer = PageBuffer::new(PIECE);
    let mut differences = Differences::none("stream");
    let (mut pages, mut received, mut said) = (0, 0, 0);
    let started = Instant::now();
    loop {
        let filled = fill_from(&mut sender, buffer.as_mut_slice())?;
        for bytes in buffer.as_slice()[..filled].chunks(PAGE) {
            // Senders send whole pages: less is the end of a stream that broke, and counts as wrong.
            if bytes.len() == PAGE {
                differences.check(bytes, STREAM, pages);
            } else {
                differences.count += 1;
            }
            pages += 1;
        }
        received += filled as u64;
        if received - said >= SAY_EVERY {
            said = received;
            println!("checker stream bytes={received} mismatched={}", differences.count);
        }
        if filled < PIECE {
            break;
        }
    }
    let (wrong, us) = (differences.count, started.elapsed().as_micros());
    let mut answer = [0; ANSWER];
    answer[..8].copy_from_slice(&received.to_le_bytes());
    answer[8..].copy_from_slice(&wrong.to_le_bytes());
    sender.write_all(&answer)?;
    println!("checker stream done bytes={received} mismatched={wrong} us={us}");
    Ok(wrong)
}

/// Fills the buffer, or as much of it as comes before the end.
fn fill_from(sender: &mut TcpStream, buffer: &mut [u8]) -> Result<usize, Failure> {
    let mut filled = 0;
    while filled < buffer.len() {
        match sender.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(filled)
}

/// Whether standard input has been closed, by which a test ends the sender.
pub(crate) fn until_input_ends() -> impl Fn() -> bool {
    let ended = Arc::new(AtomicBool::new(false));
    let seen = ended.clone();
    std::thread::spawn(move || {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        ended.store(true, Ordering::Relaxed);
    });
    move || seen.load(Ordering::Relaxed)
}

/// Sends until it is enough, then waits for the receiver's answer.
pub(crate) fn send(host: &str, port: u16, enough: impl Fn() -> bool) -> Result<Mismatched, Failure> {
    let mut receiver = TcpStream::connect((host, port)).map_err(|error| format!("{host}:{port}: {error}"))?;
    let mut buffer = vec![0; PIECE];
    let (mut page, mut sent) = (0, 0);
    let started = Instant::now();
    while !enough() {
        for bytes in buffer.chunks_exact_mut(PAGE) {
            content::fill(bytes, STREAM, page);
            page += 1;
        }
        receiver.write_all(&buffer)?;
        sent += PIECE as u64;
    }
    receiver.shutdown(Shutdown::Write)?;
    let mut answer = [0; ANSWER];
    receiver.read_exact(&mut answer).map_err(|error| format!("the receiver gave no answer: {error}"))?;
    let [received, wrong] =
        [&answer[..8], &answer[8..]].map(|half| u64::from_le_bytes(half.try_into().expect("eight bytes")));
    let us = started.elapsed().as_micros();
    println!("checker send done bytes={sent} received={received} mismatched={wrong} us={us}");
    if received != sent {
        return Err(format!("{sent} bytes were sent, {received} arrived").into());
    }
    Ok(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_arrives_and_a_broken_stream_is_seen() {
        let port = TcpListener::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address").port();
        let receiver = std::thread::spawn(move || receive(port).expect("a stream"));
        let connect = || loop {
            if let Ok(stream) = TcpStream::connect(("127.0.0.1", port)) {
                return stream;
            }
            std::thread::yield_now();
        };
        let mut stream = connect();
        let mut pages = vec![0; 3 * PAGE];
        content::fill(&mut pages[..PAGE], STREAM, 0);
        content::fill(&mut pages[PAGE..2 * PAGE], STREAM, 2);
        stream.write_all(&pages[..2 * PAGE + 5]).expect("a connection");
        stream.shutdown(Shutdown::Write).expect("a connection");
        // The second page has the third's content, and the last is cut.
        assert_eq!(receiver.join().expect("the receiver"), 2);
    }
}
