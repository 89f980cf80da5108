//! A hold on pages: while it lives, they stay where they are.

use swapd::{Piece, Run, answered};

use super::error::ReadError;
use super::outside::EngineHandle;

/// Dropped, it lets go of the pages. So no way out of a reader leaves pages held, which the engine could then never
/// page out again.
pub(super) struct Hold {
    handle: EngineHandle,
    run: Run,
}

impl Hold {
    /// Holds the pages, and says where each of them is.
    pub(super) async fn take(handle: &EngineHandle, run: Run) -> Result<(Hold, Vec<Piece>), ReadError> {
        let answer = handle.hold_async(run);
        // Before the wait, which may be given up: the engine comes to the release after the hold all the same.
        let hold = Hold { handle: handle.clone(), run };
        let pieces = answered(answer).await?;
        Ok((hold, pieces))
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // The engine's answer says nothing new, so nobody waits for it.
        drop(self.handle.release_async(self.run));
    }
}
