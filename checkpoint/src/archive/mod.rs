//! An archive: a directory with the checkpoints of one VM.
