//! The disks that a checkpoint has to have as they are at its moment, and how it has them.
//!
//! ```text
//!   no medium, read-only ──▶ not the VM's to change: no version is needed
//!   firmware's flash     ──▶ in the device state, which writes it into the file when it is loaded
//!   qcow2                ──▶ an internal snapshot, all disks' in one transaction: all of them, or none
//!   encrypted qcow2      ──▶ refused: nobody could read the version without its secret
//!   anything else        ──▶ refused, with what to do instead
//! ```
//! Internal snapshots, because they change nothing for whoever runs the VM: its disk stays in the file that the command
//! line names, so it moves and starts anew as before. An overlay (`blockdev-snapshot-sync`) would put what is written
//! from then on into another file: a start with the same command line would lose it, and spoil it by writing below it.
//!
//! They are taken before the state is saved, for then QEMU gives its disks away until the VM goes on.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::{Disk, DiskVersion};

use crate::guest::Qemu;
use crate::images;
use crate::inventory::disk_name;
use crate::qmp::QmpError;

/// Limit for all snapshots of one moment: QEMU counts a reference to each cluster in use, 2 to 9 ms a GiB of them, and
/// flushes.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(30);
/// Of disks that nobody can keep a version of here, in the place of their names' list.
const OTHERWISE: &str = "or make the checkpoint without disks (--without-disks)";
/// Nodes that hand all on to the one below them.
const FILTERS: [&str; 2] = ["throttle", "copy-on-read"];

/// A disk, and QEMU's name for it in commands.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Chosen {
    device: String,
    disk: Disk,
}

/// From QEMU's answers to `query-block` and `query-named-block-nodes`: the disks of which a checkpoint needs a version,
/// which is to be called `snapshot`. Or why there can be none, a reason a disk.
fn choose(disks: &Value, nodes: &Value, snapshot: &str) -> Result<Vec<Chosen>, Vec<String>> {
    let (mut chosen, mut refused) = (Vec::new(), Vec::new());
    for disk in disks.as_array().into_iter().flatten() {
        let medium = &disk["inserted"];
        if medium.is_null() || medium["ro"] == true {
            continue;
        }
        let node = text(&medium["node-name"]);
        let name = disk_name(disk).unwrap_or(node).to_owned();
        let format = format_of(medium, nodes);
        let Some(file) = file_of(medium) else {
            refused.push(format!(
                "disk {name} is in {:?}, which is no file of this host: give it a qcow2 file, {OTHERWISE}",
                text(&medium["file"])
            ));
            continue;
        };
        let version = match format.as_str() {
            _ if is_flash(disk) => DiskVersion::InState,
            _ if medium["encrypted"] == true => {
                refused.push(format!(
                    "disk {name} is in {}, which is encrypted: no earlier version of it can be read or put back without its \
                     secret, which no checkpoint has: encrypt what the file lies on instead, {OTHERWISE}",
                    file.display()
                ));
                continue;
            }
            "qcow2" => DiskVersion::Snapshot(snapshot.to_owned()),
            _ => {
                let file = file.display();
                refused.push(format!(
                    "disk {name} is in {file}, and the format {format} keeps no earlier version of a disk: convert it while the VM is \
                     off (qemu-img convert -O qcow2 {file} NEW, and the new name in the command line), {OTHERWISE}"
                ));
                continue;
            }
        };
        let Some(file) = file.to_str().map(str::to_owned) else {
            refused.push(format!("disk {name} is in {}, whose name is no UTF-8: rename it", file.display()));
            continue;
        };
        let device = Some(text(&disk["device"])).filter(|device| !device.is_empty()).unwrap_or(node);
        chosen.push(Chosen { device: device.to_owned(), disk: Disk { name, file, format, version } });
    }
    if refused.is_empty() { Ok(chosen) } else { Err(refused) }
}

/// Firmware's own memory, which is guest memory to QEMU. A drive that its user has called so and plugged in is none: its
/// content is not in the state.
fn is_flash(disk: &Value) -> bool {
    let qdev = text(&disk["qdev"]);
    let plugged_in = qdev.starts_with("/machine/peripheral");
    qdev.starts_with("/machine/system.flash")
        || (matches!(text(&disk["device"]), "pflash0" | "pflash1") && !plugged_in)
}

fn file_of(medium: &Value) -> Option<PathBuf> {
    images::file(text(&medium["file"]))
}

/// The format of a disk: of the node below those that hand all on, if it has such.
fn format_of(medium: &Value, nodes: &Value) -> String {
    let top = text(&medium["drv"]);
    let below = || {
        let file = file_of(medium)?;
        let mut nodes = nodes.as_array().into_iter().flatten();
        nodes
            .find(|node| text(&node["drv"]) == "qcow2" && file_of(node).as_deref() == Some(&file))
            .map(|_| "qcow2")
    };
    Some(top).filter(|top| !FILTERS.contains(top)).or_else(below).unwrap_or(top).to_owned()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// The names of the disks that have an internal snapshot, for commands; and of the snapshot.
fn with_snapshots(chosen: &[Chosen]) -> impl Iterator<Item = (&str, &str)> {
    chosen.iter().filter_map(|chosen| match &chosen.disk.version {
        DiskVersion::Snapshot(name) => Some((chosen.device.as_str(), name.as_str())),
        DiskVersion::InState => None,
    })
}

impl Qemu {
    fn choose_disks(&mut self, snapshot: &str) -> Result<Vec<Chosen>, Failure> {
        let disks = self.ask("query-block", Value::Null)?;
        let nodes = self.ask("query-named-block-nodes", json!({ "flat": true }))?;
        choose(&disks, &nodes, snapshot).map_err(|refused| {
            let text =
                format!("no checkpoint can have this VM's disks as they are now: {}", refused.join("; "));
            Failure::new(FailureKind::CannotMove, text)
        })
    }

    pub(crate) fn disks_for(&mut self, snapshot: &str) -> Result<Vec<Disk>, Failure> {
        Ok(self.choose_disks(snapshot)?.into_iter().map(|chosen| chosen.disk).collect())
    }

    /// Gives each disk a version of this moment, or none.
    pub(crate) fn take_snapshots(&mut self, snapshot: &str) -> Result<Vec<Disk>, Failure> {
        let chosen = self.choose_disks(snapshot)?;
        let action = |(device, name)| json!({ "type": "blockdev-snapshot-internal-sync", "data": { "device": device, "name": name } });
        let actions: Vec<Value> = with_snapshots(&chosen).map(action).collect();
        if !actions.is_empty() {
            self.ask_for("transaction", json!({ "actions": actions }), SNAPSHOT_TIMEOUT).map_err(
                |error| {
                    // What was refused was undone. What has no answer may be done still: this comes behind it.
                    if !matches!(error, QmpError::Refused { .. }) {
                        let _ = self.delete_snapshots(&chosen);
                    }
                    let names: Vec<&str> = chosen.iter().map(|chosen| chosen.disk.name.as_str()).collect();
                    let text = format!("no snapshot of the disks ({}): {}", names.join(", "), chain(&error));
                    Failure::new(FailureKind::Vm, text)
                },
            )?;
        }
        Ok(chosen.into_iter().map(|chosen| chosen.disk).collect())
    }

    /// The snapshots that stay, and how they are removed, of a QEMU that must not touch its disks now.
    pub(crate) fn left_in(disks: &[Disk]) -> String {
        let named = disks.iter().filter_map(|disk| match &disk.version {
            DiskVersion::Snapshot(name) => Some(format!("snapshot {name} stays in {}", disk.file)),
            DiskVersion::InState => None,
        });
        let named: Vec<String> = named.collect();
        format!(
            "the disks are not the VM's own until it runs: {}; remove it when the VM runs \
             (blockdev-snapshot-delete-internal-sync on a monitor) or is off (qemu-img snapshot -d NAME FILE)",
            named.join(", ")
        )
    }

    /// Removes what [`Qemu::take_snapshots`] has made. A disk that the VM has no more is left as it is.
    pub(crate) fn drop_snapshots(&mut self, disks: &[Disk]) -> Result<(), Failure> {
        let now = self.ask("query-block", Value::Null)?;
        let of = |disk: &Disk| Some(Chosen { device: device_in(&now, &disk.file)?, disk: disk.clone() });
        let chosen: Vec<Chosen> = disks.iter().filter_map(of).collect();
        self.delete_snapshots(&chosen)
    }

    /// QEMU's name for the disk that is in that file now.
    pub(crate) fn device_of(&mut self, file: &str) -> Result<Option<String>, Failure> {
        Ok(device_in(&self.ask("query-block", Value::Null)?, file))
    }

    /// Deletes a snapshot that may have gone already.
    pub(crate) fn delete_snapshot(&mut self, device: &str, name: &str) -> Result<(), Failure> {
        let which = json!({ "device": device, "name": name });
        match self.ask_for("blockdev-snapshot-delete-internal-sync", which, SNAPSHOT_TIMEOUT) {
            Err(QmpError::Refused { text, .. }) if text.contains("does not exist on device") => Ok(()),
            deleted => deleted.map(drop).map_err(|error| Failure::new(FailureKind::Vm, chain(&error))),
        }
    }

    fn delete_snapshots(&mut self, chosen: &[Chosen]) -> Result<(), Failure> {
        let mut stay = Vec::new();
        for (device, name) in with_snapshots(chosen) {
            let which = json!({ "device": device, "name": name });
            let deleted = self.ask_for("blockdev-snapshot-delete-internal-sync", which, SNAPSHOT_TIMEOUT);
            if let Err(error) = deleted {
                stay.push(format!("snapshot {name} stays in disk {device}: {}", chain(&error)));
            }
        }
        if stay.is_empty() { Ok(()) } else { Err(Failure::new(FailureKind::Vm, stay.join("; "))) }
    }
}

/// From QEMU's answer to `query-block`: its name for the disk that is in that file.
fn device_in(disks: &Value, file: &str) -> Option<String> {
    let mut all = disks.as_array().into_iter().flatten();
    let found = all.find(|disk| file_of(&disk["inserted"]).as_deref() == Some(Path::new(file)))?;
    let names = [text(&found["device"]), text(&found["inserted"]["node-name"])];
    names.into_iter().find(|name| !name.is_empty()).map(str::to_owned)
}

fn chain(error: &QmpError) -> String {
    vmprocess::failure::chain(error)
}

#[cfg(test)]
#[path = "disks_tests.rs"]
mod tests;
