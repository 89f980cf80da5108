//! What a VM's process does for a checkpoint of it.
