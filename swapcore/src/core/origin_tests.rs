//! What becomes of pages at the origin, action by action.
