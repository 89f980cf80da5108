//! Notices: messages that the engine sends to its owner without being asked.

use swapcore::units::PageNo;

/// A message to the engine's owner. The callback that receives it runs on the engine's thread, and must not block.
#[derive(Clone, Debug)]
pub enum Notice {
    /// A write to the store failed. Nothing is lost: the pages stay in RAM, and are written again later.
    StoreFailed(String),
    /// All pages whose write had failed are written: the store works again.
    StoreRecovered,
    /// The VM needs a frame, and there will be none as long as the store fails: pause it, and say why. Few frames are
    /// kept for what a vCPU touches until it can be stopped.
    Starved(String),
    /// There are frames again, after [`Notice::Starved`]: the VM may go on.
    Relieved,
    /// The VM waits for the store, or for its origin, which has given nothing for some seconds: pause it, and say why.
    /// Nothing is lost; it is asked again and again. Told of each of the two by itself.
    Unreachable(String),
    /// All that did not answer does so again: all who waited have been served, or are about to be.
    Reachable,
    /// The VM needs a frame, and has waited for some time: all that could leave is held where it is. It goes on when
    /// that is let go of, or with a larger budget.
    Short {
        /// How much of RAM could not leave because something holds its frames.
        pinned_bytes: u64,
    },
    /// There are frames again, after [`Notice::Short`].
    Enough,
    /// The guest sees a memory error when it touches this page.
    Poisoned(PageNo),
}
