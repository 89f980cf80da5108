//! Whether all of a guest's memory is vmemd's: QEMU is asked, whatever its command line was.

use serde_json::{Value, json};
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::qemu::Backend;

use crate::guest::Qemu;

impl Qemu {
    /// # Errors
    /// If the guest has memory that is not in `backends`: it would have no budget, and would not move.
    pub(crate) fn owns_memory(&mut self, backends: &[Backend]) -> Result<(), Failure> {
        let sizes = self.ask("query-memory-size-summary", Value::Null)?;
        let backend = self.ask("qom-get", json!({ "path": "/machine", "property": "memory-backend" }))?;
        // Without one, the machine's memory is that of its NUMA nodes.
        let file = match backend.as_str().filter(|path| !path.is_empty()) {
            None => None,
            // A backend that is no file has no such property.
            Some(path) => {
                let asked = self.ask("qom-get", json!({ "path": path, "property": "mem-path" }));
                Some((path.to_owned(), asked.ok().and_then(|file| file.as_str().map(str::to_owned))))
            }
        };
        judge(&sizes, file.as_ref().map(|(path, file)| (path.as_str(), file.as_deref())), backends)
            .map_err(|text| Failure::new(FailureKind::Usage, text))
    }
}

/// `sizes` as QEMU says them; the object that the machine's memory is, and its file.
fn judge(sizes: &Value, object: Option<(&str, Option<&str>)>, backends: &[Backend]) -> Result<(), String> {
    let bytes = |field: &str| sizes[field].as_u64().unwrap_or(0);
    let (base, plugged) = (bytes("base-memory"), bytes("plugged-memory"));
    let ours: u64 = backends.iter().map(|backend| backend.bytes).sum();
    if base + plugged != ours {
        return Err(format!(
            "the guest has {base} bytes of memory and {plugged} of memory devices, and only {ours} of these are vmemd's: it \
             would run without a budget (is there a second -m, or a memory device, on QEMU's command line?)"
        ));
    }
    let Some((path, file)) = object else { return Ok(()) };
    let known = file.is_some_and(|file| backends.iter().any(|backend| backend.path.as_os_str() == file));
    if known {
        return Ok(());
    }
    Err(format!(
        "the guest's memory is {path}, which is not vmemd's: it would run without a budget (does another \
         `-machine memory-backend=` come behind vmemd's on QEMU's command line?)"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmprocess::qemu::memory_file;

    #[test]
    fn memory_that_is_not_ours_is_told() {
        let backends = [2 << 20, 4 << 20].map(|bytes| Backend { path: memory_file(0), bytes });
        let sizes = |base: u64, plugged: u64| json!({ "base-memory": base, "plugged-memory": plugged });
        let file = memory_file(0).display().to_string();
        let ours = Some(("/objects/vmemd-ram0", Some(file.as_str())));
        assert_eq!(judge(&sizes(6 << 20, 0), None, &backends), Ok(()));
        assert_eq!(judge(&sizes(6 << 20, 0), ours, &backends), Ok(()));
        for (sizes, object, says) in [
            (sizes(8 << 20, 0), ours, "8388608 bytes of memory and 0 of memory devices, and only 6291456"),
            (sizes(6 << 20, 1 << 20), ours, "1048576 of memory devices"),
            (json!({}), ours, "has 0 bytes"),
            (sizes(6 << 20, 0), Some(("/objects/pc.ram", None)), "is /objects/pc.ram, which is not vmemd's"),
            (sizes(6 << 20, 0), Some(("/objects/x", Some("/dev/shm/x"))), "is /objects/x, which"),
        ] {
            let text = judge(&sizes, object, &backends).unwrap_err();
            assert!(text.contains(says), "{says}: {text}");
        }
    }
}
