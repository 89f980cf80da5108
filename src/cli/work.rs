//! Long work of a command on an archive: how far it is, and whether to go on.

use std::time::Instant;

use checkpoint::archive::Progress;
use indicatif::ProgressBar;
use vmprocess::signals;
use vmprocess::size::Size;

use super::terminal::bar;

/// Long work, with its progress bar.
pub(super) struct Work {
    bar: ProgressBar,
    began: Instant,
}

impl Work {
    pub(super) fn begin(what: &str) -> Work {
        Work { bar: bar(what), began: Instant::now() }
    }

    /// Shows how far it is, and says whether to go on.
    pub(super) fn show(&self, progress: Progress) -> bool {
        let Progress { bytes_done, bytes_total } = progress;
        self.bar.set_length(bytes_total.max(1));
        self.bar.set_position(bytes_done);
        let rate = (bytes_done as f64 / self.began.elapsed().as_secs_f64().max(0.001)) as u64;
        let left = (bytes_total - bytes_done).checked_div(rate).unwrap_or(0);
        self.bar.set_message(format!("{}/s  {left} s left", rounded(rate)));
        signals::caught().is_none()
    }

    /// Seconds that it took.
    pub(super) fn end(&self) -> f64 {
        self.bar.finish_and_clear();
        self.began.elapsed().as_secs_f64()
    }
}

pub(super) fn rounded(bytes: u64) -> String {
    format!("{:#}", Size(bytes))
}
