//! The parts that a machine consists of, in QEMU's own words: listed when QEMU starts, and again before the VM moves.
//!
//! The target starts QEMU with the command line of the start. What a monitor has changed since would be missing there,
//! or worse: a disk would be the file of before, without what was written since. So a machine moves only if both lists
//! are the same. Not listed is what changes in the life of a machine: counts, sizes, who is connected, what a balloon
//! holds.

use std::collections::BTreeMap;

use serde_json::{Value, json};

/// The questions to QEMU, in this order.
const QUESTIONS: [&str; 10] = [
    "query-block",
    "query-named-block-nodes",
    "query-cpus-fast",
    "query-chardev",
    "query-vnc-servers",
    "qom-list",
    "qom-list",
    "qom-list",
    "human-monitor-command",
    "human-monitor-command",
];
/// Where devices and objects are, and what one of them is called.
const PLACES: [(&str, &str); 3] =
    [("/machine/peripheral", "device"), ("/machine/peripheral-anon", "device"), ("/objects", "object")];
/// What only the monitor for people tells: network backends, and the ports that `user` ones forward.
const WORDS: [&str; 2] = ["info network", "info usernet"];
/// Longest name of a file that is shown: some are JSON of any length.
const SHOWN_MAX: usize = 120;
/// Ids of what vmemd adds itself, and of QEMU's debugger.
const NOT_THE_USERS: [&str; 2] = ["vmemd-", "gdb"];
/// Network backends that QEMU describes by their options alone, not by who is connected.
const TELLING_NETDEVS: [&str; 3] = ["user", "tap", "bridge"];

/// Everything that has a name in the machine (`disk d0`), and what it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Inventory(BTreeMap<String, String>);

impl Inventory {
    /// The commands whose answers [`Inventory::new`] wants.
    pub(crate) fn questions() -> Vec<(&'static str, Value)> {
        let (mut places, mut words) = (PLACES.iter(), WORDS.iter());
        let arguments = |name: &str| match name {
            "query-named-block-nodes" => json!({ "flat": true }),
            "qom-list" => json!({ "path": places.next().map(|(path, _)| path) }),
            "human-monitor-command" => json!({ "command-line": words.next() }),
            _ => Value::Null,
        };
        let values: Vec<Value> = QUESTIONS.iter().copied().map(arguments).collect();
        QUESTIONS.into_iter().zip(values).collect()
    }

    /// From the answers. What this QEMU cannot be asked is null, and then never changes.
    pub(crate) fn new(answers: &[Value]) -> Inventory {
        let mut all = Inventory::default();
        let mut answers = answers.iter();
        let mut next = || answers.next().unwrap_or(&Value::Null);
        items(next()).for_each(|disk| all.disk(disk));
        items(next()).for_each(|node| all.node(node));
        all.note("number of processors", items(next()).count().to_string());
        items(next()).for_each(|chardev| all.chardev(chardev));
        items(next()).for_each(|server| all.vnc(server));
        for (_, what) in PLACES {
            items(next()).for_each(|child| all.child(what, child));
        }
        text(next()).lines().for_each(|line| all.netdev(line));
        text(next()).lines().for_each(|line| all.forward(line));
        all
    }

    /// The parts that are not as they were `then`, each in a few words.
    pub(crate) fn changes(&self, then: &Inventory) -> Vec<String> {
        let mut names: Vec<&String> = self.0.keys().chain(then.0.keys()).collect();
        names.sort();
        names.dedup();
        let told = |name: &&String| match (then.0.get(*name), self.0.get(*name)) {
            (Some(was), Some(is)) if was == is => None,
            (Some(was), Some(is)) => {
                Some(format!("{name} is now {}, it was started with {}", short(is), short(was)))
            }
            (Some(_), None) => Some(format!("{name} was removed")),
            (None, _) => Some(format!("{name} was added")),
        };
        names.iter().filter_map(told).collect()
    }

    fn note(&mut self, name: impl Into<String>, is: String) {
        // Of a device with several queues the first speaks for all.
        self.0.entry(name.into()).or_insert(is);
    }

    fn disk(&mut self, disk: &Value) {
        let Some(name) = disk_name(disk) else { return };
        let medium = &disk["inserted"];
        if medium.is_null() {
            return self.note(format!("disk {name}"), "empty".to_owned());
        }
        let mut is = layers(&medium["image"]);
        if medium["ro"] == true {
            is += ", read-only";
        }
        self.note(format!("disk {name}"), is);
        let limits = limits(medium);
        let limits = if limits.is_empty() { "none".to_owned() } else { limits.join(" ") };
        self.note(format!("I/O limit of disk {name}"), limits);
    }

    /// Those that somebody named: QEMU's own names are of nodes that belong to a disk.
    fn node(&mut self, node: &Value) {
        let name = text(&node["node-name"]);
        if !name.starts_with('#') {
            let is = format!("{} ({})", text(&node["file"]), text(&node["drv"]));
            self.note(format!("block node {name}"), is);
        }
    }

    fn chardev(&mut self, chardev: &Value) {
        let label = text(&chardev["label"]);
        if !NOT_THE_USERS.iter().any(|prefix| label.starts_with(prefix)) {
            self.note(format!("chardev {label}"), end_point(text(&chardev["filename"])));
        }
    }

    fn vnc(&mut self, server: &Value) {
        let address = |at: &Value| {
            format!("{} {} {}", text(&at["family"]), text(&at["host"]), text(&at["service"]))
                .replace("  ", " ")
        };
        let addresses: Vec<String> = items(&server["server"]).map(address).collect();
        self.note(format!("VNC server {}", text(&server["id"])), addresses.join(", "));
    }

    fn child(&mut self, what: &str, child: &Value) {
        if let Some(kind) = text(&child["type"]).strip_prefix("child<") {
            self.note(format!("{what} {}", text(&child["name"])), kind.trim_end_matches('>').to_owned());
        }
    }

    /// A line of `info network`, such as ` \ n0: index=0,type=user,net=10.0.2.0,restrict=off`.
    fn netdev(&mut self, line: &str) {
        let Some((name, options)) = line.split_once(": index=") else { return };
        let name = name.trim_start_matches([' ', '\\']);
        let options = options.trim_end().split_once(',').map_or("", |(_, options)| options);
        let options = options.strip_prefix("type=").unwrap_or(options);
        let kind = options.split(',').next().unwrap_or_default();
        match kind {
            // A device, or a part of one.
            "nic" => {}
            kind if TELLING_NETDEVS.contains(&kind) => {
                self.note(format!("netdev {name}"), options.to_owned());
            }
            kind => self.note(format!("netdev {name}"), kind.to_owned()),
        }
    }

    /// A line of `info usernet`, such as `  TCP[HOST_FORWARD]  12  127.0.0.1  5555  10.0.2.15  22  0  0`.
    fn forward(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [kind, _, from, from_port, to, to_port, ..] = words[..]
            && let Some(protocol) = kind.strip_suffix("[HOST_FORWARD]")
        {
            self.note(format!("port {protocol} {from}:{from_port}"), format!("{to}:{to_port}"));
        }
    }
}

/// A disk's name of those in the answer to `query-block`: as its user calls it, not what is inside of it.
pub(crate) fn disk_name(disk: &Value) -> Option<&str> {
    let name = [text(&disk["device"]), text(&disk["qdev"])].into_iter().find(|name| !name.is_empty())?;
    Some(name.trim_start_matches("/machine/peripheral/").trim_end_matches("/virtio-backend"))
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// An image and those behind it: `snap.qcow2 (qcow2) on base.img (raw)`.
fn layers(image: &Value) -> String {
    let chain = std::iter::successors(Some(image), |image| image.get("backing-image"));
    let named = chain.map(|image| format!("{} ({})", text(&image["filename"]), text(&image["format"])));
    named.collect::<Vec<_>>().join(" on ")
}

/// I/O limits, which a monitor may set: the target's QEMU would not know them.
fn limits(medium: &Value) -> Vec<String> {
    let is_limit = |name: &str| name.starts_with("iops") || name.starts_with("bps");
    let set = medium.as_object().into_iter().flatten().filter(|(name, value)| is_limit(name) && **value != 0);
    set.map(|(name, value)| format!("{name}={value}")).collect()
}

/// What a chardev was told to be. A socket is described by who is connected, so only its kind is sure; but for a
/// server's path, which stays.
fn end_point(filename: &str) -> String {
    let told = filename.strip_prefix("disconnected:").unwrap_or(filename);
    let told = told.split(" <-> ").next().unwrap_or_default();
    let scheme = told.split(':').next().unwrap_or_default();
    let is_path = told.starts_with("unix:/") && told.ends_with(",server=on");
    let is_socket = matches!(scheme, "unix" | "tcp" | "telnet" | "websocket" | "tn3270" | "vsock" | "fd");
    if is_path || !is_socket { told.to_owned() } else { scheme.to_owned() }
}

fn short(text: &str) -> String {
    match text.char_indices().nth(SHOWN_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

#[cfg(test)]
#[path = "inventory_tests.rs"]
mod tests;
