//! One data stream: its records, in order, into the sink.

use std::mem::size_of;

use swapd::Run;
use tokio::sync::mpsc;

use super::sink::{Batch, Sink, StreamInput};
use crate::link::error::SessionError;
use crate::link::read_exact;
use crate::outside::{planted, yield_to_ring};
use crate::wire::control::{Totals, read_totals};
use crate::wire::extents::Bounds;
use crate::wire::record::{FLAG_LAST, HEADER_BYTES, Header, MAX_DATA_META, RecordKind, Sequence};

/// A data stream has come to the end of a round.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RoundEnd {
    pub(crate) round: u64,
    /// Pages that have come on it since its start.
    pub(crate) totals: Totals,
    pub(crate) last: bool,
}

/// What a data stream's intake needs besides the stream: what may come on it, and who hears of the end of a round.
#[derive(Clone, Debug)]
pub(crate) struct Intake {
    pub(crate) bounds: Bounds,
    pub(crate) sequence: Sequence,
    pub(crate) ends: mpsc::Sender<RoundEnd>,
}

/// Runs until the stream's last round has ended, or the session fails.
pub(crate) async fn run(input: StreamInput, mut intake: Intake, mut sink: Sink) {
    let result = receive(&input, &mut intake, &mut sink).await;
    if planted!(EndsRoundsEarly)
        && let Ok(last) = result
    {
        let _ = intake.ends.send(last).await;
        yield_to_ring().await;
    }
    let closed = sink.rest().await;
    match result.and_then(|last| closed.map(|()| last)) {
        // Said only now, when every frame is back.
        Ok(last) => {
            let _ = intake.ends.send(last).await;
        }
        Err(error) => input.session_state.fail(error),
    }
}

async fn receive(
    input: &StreamInput,
    intake: &mut Intake,
    sink: &mut Sink,
) -> Result<RoundEnd, SessionError> {
    let mut head = Vec::with_capacity(HEADER_BYTES + MAX_DATA_META);
    let mut runs: Vec<Run> = Vec::new();
    let mut totals = Totals::default();
    let mut round = 0;
    loop {
        head.clear();
        let (header, filled) = match read_head(input, intake, head).await {
            Err(_) if planted!(BelievesLostStreams) => {
                return Ok(RoundEnd { round: round + 1, totals, last: true });
            }
            read => read?,
        };
        head = filled;
        let meta = &head[HEADER_BYTES..];
        let pages = u64::from(header.pages);
        match header.kind {
            RecordKind::Pages => {
                let (runs_bytes, sums) = meta.split_at(header.number as usize * size_of::<u64>());
                intake.bounds.decode(runs_bytes, header.pages, &mut runs)?;
                sink.pages(input, Batch { runs: &runs, sums: sums.as_chunks().0 }).await?;
                totals.pages += pages;
            }
            RecordKind::Zeros => {
                intake.bounds.decode(meta, header.pages, &mut runs)?;
                sink.zeros(input, &runs).await?;
                totals.zeros += pages;
            }
            RecordKind::Poisoned => {
                intake.bounds.decode(meta, header.pages, &mut runs)?;
                sink.poisoned(input, &runs).await?;
                totals.poisoned += pages;
            }
            RecordKind::RoundEnd => {
                round += 1;
                let end = RoundEnd { round, totals, last: header.has(FLAG_LAST) };
                if header.number != round || read_totals(meta)? != totals {
                    let text = format!("the end of round {}, where {end:?} was due", header.number);
                    return Err(SessionError::Peer(text));
                }
                if end.last {
                    return Ok(end);
                }
                sink.rest().await?;
                // Nobody listens any more if the session has failed.
                let _ = intake.ends.send(end).await;
            }
            kind => return Err(SessionError::Peer(format!("a {kind:?} record on a data stream"))),
        }
    }
}

/// Reads a header and its metadata, checked.
async fn read_head(
    input: &StreamInput,
    intake: &mut Intake,
    head: Vec<u8>,
) -> Result<(Header, Vec<u8>), SessionError> {
    let link = SessionError::link("waiting for pages");
    let (result, mut head) = read_exact(&input.socket, head, 0, HEADER_BYTES, &input.session_state).await;
    result.map_err(&link)?;
    let bytes: [u8; HEADER_BYTES] = *head.first_chunk().expect("just read");
    let header = Header::open(&bytes)?;
    if !header.kind.is_data() {
        return Err(SessionError::Peer(format!("a {:?} record on a data stream", header.kind)));
    }
    let end = HEADER_BYTES + header.meta_bytes as usize;
    if end > HEADER_BYTES {
        let (result, filled) = read_exact(&input.socket, head, HEADER_BYTES, end, &input.session_state).await;
        result.map_err(&link)?;
        head = filled;
    }
    Header::verify(&bytes, &head[HEADER_BYTES..], &mut intake.sequence)?;
    Ok((header, head))
}
