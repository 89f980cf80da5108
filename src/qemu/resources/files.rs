//! Disk images, as `-drive`, `-blockdev` and the short options name them.

use serde_json::Value;

use super::what::{SeeOne, What};
use crate::qemu::props::{Props, json};

/// Filters over one image: nobody means more, and a stranger's command line may name any number.
const FILTERS_MAX: u32 = 8;

/// A file name as QEMU's block layer reads it: a path, `protocol:…`, or `json:{…}`. The new one, if it was changed.
pub(super) fn disk(spec: &str, see: SeeOne<'_>) -> Option<String> {
    disk_within(FILTERS_MAX, spec, see)
}

fn disk_within(filters: u32, spec: &str, see: SeeOne<'_>) -> Option<String> {
    if let Some(set) = spec.strip_prefix("/dev/fdset/") {
        see(What::Descriptor, set);
        return None;
    }
    if spec.is_empty() {
        return None;
    }
    let end = spec.find([':', '/']).unwrap_or(spec.len());
    if !spec[end..].starts_with(':') {
        return see(What::Disk, spec);
    }
    let (protocol, rest) = (&spec[..end], &spec[end + 1..]);
    match protocol {
        "file" | "host_device" | "host_cdrom" => {
            see(What::Disk, rest).map(|path| format!("{protocol}:{path}"))
        }
        "json" => {
            let mut props = match json(rest) {
                Ok(value @ Value::Object(_)) => Props::Json(value),
                // QEMU does not take it either.
                _ => return see(What::Disk, spec),
            };
            storage("blockdev", &mut props, see).then(|| format!("json:{}", props.print()))
        }
        // Taken for a file's name, and so missing everywhere.
        "blkdebug" | "blkverify" if filters == 0 => see(What::Disk, spec),
        "blkdebug" | "blkverify" => {
            let (rules, image) = rest.split_once(':')?;
            let first = if rules.is_empty() { None } else { see(What::File, rules) };
            let second = disk_within(filters - 1, image, see);
            let changed = first.is_some() || second.is_some();
            let (first, second) =
                (first.unwrap_or_else(|| rules.to_owned()), second.unwrap_or_else(|| image.to_owned()));
            changed.then(|| format!("{protocol}:{first}:{second}"))
        }
        "fat" => {
            // fat:[floppy:][rw:][32:]DIRECTORY
            let start = rest.rfind(':').map_or(0, |at| at + 1);
            see(What::Directory, &rest[start..]).map(|path| format!("fat:{}{path}", &rest[..start]))
        }
        "nbd" => {
            let rest = rest.strip_prefix("unix:")?;
            let end = rest.find(':').unwrap_or(rest.len());
            see(What::Connects, &rest[..end]).map(|path| format!("nbd:unix:{path}{}", &rest[end..]))
        }
        // Of the network.
        _ => None,
    }
}

/// The properties of a drive or a block device, at any depth.
pub(super) fn storage(option: &str, props: &mut Props, see: SeeOne<'_>) -> bool {
    props.visit(&mut |path, value| {
        let (above, leaf) = path.rsplit_once('.').unwrap_or(("", path));
        match leaf {
            "filename" => disk(value, see),
            // In -drive a file name; in -blockdev, and below a drive, the name of another node.
            "file" if option == "drive" && above.is_empty() => disk(value, see),
            "path" if above.ends_with("server") => see(What::Connects, value),
            "dir" => see(What::Directory, value),
            _ => None,
        }
    })
}
