//! The finding about one requirement.

use serde::Serialize;

/// One thing that vmemd wants of a host.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    pub name: &'static str,
    /// Nothing works without it. The rest is for some uses only.
    pub needed: bool,
    pub found: bool,
    /// What was found, or what is missing.
    pub detail: String,
    /// What to do if it is missing.
    pub remedy: Option<String>,
}
