//! Sends what a data stream is given, one after the other.

use std::io;
use std::rc::Rc;

use swapd::Run;
use tokio::sync::mpsc;
use tokio_uring::buf::BoundedBuf;

use super::record;
use super::streams::{Outgoing, SendState};
use crate::link::error::SessionError;
use crate::outside::TcpStream;
use crate::wire::control::{round_end, sealed};
use crate::wire::extents;
use crate::wire::record::{Header, MAX_RECORD_RUNS, RecordKind, Sequence};

/// Runs until nobody can give it anything any more, or the link breaks.
pub(crate) async fn run(
    state: Rc<SendState>,
    stream: usize,
    socket: TcpStream,
    mut sequence: Sequence,
    mut outgoing: mpsc::Receiver<Outgoing>,
) {
    let stream = &state.streams[stream];
    while let Some(next) = outgoing.recv().await {
        let result = match next {
            Outgoing::Pages(mut buffer) => {
                let region = record::seal(&mut buffer, &mut sequence);
                let result = write(&socket, region, &state).await;
                stream.count(RecordKind::Pages, u64::from(buffer.pages()));
                stream.give_back(buffer);
                result
            }
            Outgoing::Bare(kind, runs) => {
                let pages: u32 = runs.iter().map(|run| run.len).sum();
                let result = write(&socket, bare(kind, &runs, &mut sequence), &state).await;
                stream.count(kind, u64::from(pages));
                result
            }
            Outgoing::RoundEnd { round, last } => {
                write(&socket, round_end(round, stream.totals.get(), last, &mut sequence), &state).await
            }
        };
        if let Err(source) = result {
            return state.session_state.fail(SessionError::Link { during: "sending pages", source });
        }
    }
}

/// A record of pages without content.
fn bare(kind: RecordKind, runs: &[Run], sequence: &mut Sequence) -> Vec<u8> {
    assert!(runs.len() <= MAX_RECORD_RUNS as usize, "{} runs in one record", runs.len());
    let meta: Vec<u8> = runs.iter().flat_map(|run| extents::encode(*run)).collect();
    let pages = runs.iter().map(|run| run.len).sum();
    let header = Header { pages, ..Header::plain(kind, runs.len() as u64, meta.len()) };
    sealed(&header, &meta, sequence)
}

async fn write(socket: &TcpStream, bytes: impl BoundedBuf, state: &SendState) -> io::Result<()> {
    let length = bytes.bytes_init();
    let (result, _) = socket.write_all(bytes).await;
    state.session_state.sent(length);
    result
}
