//! The command line of what is done with a checkpoint and its disks' snapshots.

use std::path::PathBuf;

use clap::Args;

use super::values::{JsonArg, KeyArg};

/// A checkpoint that is to go.
#[derive(Debug, Args)]
pub(super) struct RemoveArgs {
    /// The archive
    #[arg(value_name = "DIR")]
    pub(super) archive: PathBuf,
    /// The checkpoint
    #[arg(value_name = "NAME")]
    pub(super) checkpoint: String,
    /// Leave its snapshots in the disks' files, such as for a copy of it in another archive
    #[arg(long)]
    pub(super) leave_snapshots: bool,
    #[command(flatten)]
    pub(super) json: JsonArg,
}

/// Checkpoints that are to be looked at.
#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    /// The archive
    #[arg(value_name = "DIR")]
    pub(super) archive: PathBuf,
    /// The checkpoint [default: all]
    #[arg(value_name = "NAME")]
    pub(super) checkpoint: Option<String>,
    /// Do not look for the disks, which are on another host, say
    #[arg(long)]
    pub(super) without_disks: bool,
    #[command(flatten)]
    pub(super) key: KeyArg,
    #[command(flatten)]
    pub(super) json: JsonArg,
}

/// A checkpoint that is to stand alone.
#[derive(Debug, Args)]
pub(super) struct MergeArgs {
    /// The archive
    #[arg(value_name = "DIR")]
    pub(super) archive: PathBuf,
    /// The checkpoint
    #[arg(value_name = "NAME")]
    pub(super) checkpoint: String,
    #[command(flatten)]
    pub(super) key: KeyArg,
    #[command(flatten)]
    pub(super) json: JsonArg,
}
