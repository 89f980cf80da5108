//! What a VM's process does to begin from a checkpoint.
