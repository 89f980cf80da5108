//! vCPUs that wait for pages. Each waits for a page that comes (it is read, moved or written), or for a frame: then its
//! page is *deferred*.

use std::collections::VecDeque;

use super::page_map::PageMap;
use crate::api::FaultKind;
use crate::units::PageNo;

#[derive(Debug, Default)]
pub(crate) struct Waiters {
    waiting: PageMap<FaultKind>,
    /// Of these pages, the ones for which there was no frame, in order. What has come meanwhile is still among them.
    deferred: VecDeque<PageNo>,
    /// It has been told that some wait for frames in vain.
    starved_told: bool,
}

impl Waiters {
    /// Somebody waits for the page. False, if another one did already.
    pub(crate) fn wait(&mut self, page: PageNo, kind: FaultKind) -> bool {
        self.waiting.insert(page, kind).is_none()
    }

    pub(crate) fn wait_for(&self, page: PageNo) -> bool {
        self.waiting.contains_key(&page)
    }

    /// Whoever waited for the page goes on.
    pub(crate) fn end(&mut self, page: PageNo) -> Option<FaultKind> {
        if self.waiting.is_empty() { None } else { self.waiting.remove(&page) }
    }

    /// Whether anybody waits for anything.
    pub(crate) fn any(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(crate) fn pages(&self) -> impl ExactSizeIterator<Item = PageNo> {
        self.waiting.keys().copied()
    }

    /// There is no frame for the page.
    pub(crate) fn defer(&mut self, page: PageNo) {
        self.deferred.push_back(page);
    }

    /// The page that gets the next frame.
    pub(crate) fn first_deferred(&self) -> Option<PageNo> {
        self.deferred.front().copied()
    }

    pub(crate) fn end_first_deferred(&mut self) {
        self.deferred.pop_front();
    }

    pub(crate) fn is_deferred(&self, page: PageNo) -> bool {
        self.deferred.contains(&page)
    }

    pub(crate) fn any_deferred(&self) -> bool {
        !self.deferred.is_empty()
    }

    pub(crate) fn is_starved_told(&self) -> bool {
        self.starved_told
    }

    /// Notes that it is told, or not true any more; returns what was noted before.
    pub(crate) fn set_starved_told(&mut self, told: bool) -> bool {
        std::mem::replace(&mut self.starved_told, told)
    }
}
