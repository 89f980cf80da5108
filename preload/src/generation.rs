//! The VM generation id of a QEMU that moves: with `guid=auto` only QEMU knows it, and the target's would make another.
//! So what a target is told has the one that the guest sees.

use std::time::Duration;

use serde_json::{Value, json};
use vmprocess::failure::{Failure, FailureKind};

use crate::guest::Qemu;
use crate::qmp::QmpError;

const DEVICE: &str = "vmgenid";
const LIMIT: Duration = Duration::from_secs(10);

impl Qemu {
    /// The offer, with the id that the guest sees.
    pub(crate) fn with_generation(&mut self, offer: &str) -> Result<String, Failure> {
        if !offer.contains(DEVICE) {
            return Ok(offer.to_owned());
        }
        match self.ask_for("query-vm-generation-id", Value::Null, LIMIT) {
            Ok(told) => Ok(with_id(offer, told["guid"].as_str().unwrap_or_default())),
            // It has none: a file is called so.
            Err(QmpError::Refused { .. }) => Ok(offer.to_owned()),
            Err(error) => Err(Failure::new(FailureKind::Vm, vmprocess::failure::chain(&error))),
        }
    }
}

/// The offer whose command line names the id. As it was, if there is nothing in it that could.
fn with_id(offer: &str, id: &str) -> String {
    let Ok(mut whole) = serde_json::from_str::<Value>(offer) else { return offer.to_owned() };
    if id.is_empty() {
        return offer.to_owned();
    }
    let mut is_device = false;
    for word in whole["args"].as_array_mut().into_iter().flatten() {
        let text = word.as_str().unwrap_or_default();
        if is_device && let Some(text) = named(text, id) {
            *word = text.into();
        }
        is_device = matches!(word.as_str(), Some("-device" | "--device"));
    }
    whole.to_string()
}

/// A device's properties with the id, if it is that device.
fn named(properties: &str, id: &str) -> Option<String> {
    if let Ok(Value::Object(mut members)) = serde_json::from_str(properties) {
        let is_it = members.get("driver").is_some_and(|driver| driver == DEVICE);
        members.insert("guid".to_owned(), json!(id));
        return is_it.then(|| Value::Object(members).to_string());
    }
    // None of its properties has a comma in it that is no separator, but for an id, where it is doubled, and stays so.
    let mut parts = properties.split(',').peekable();
    let is_it = |part: &str| part == DEVICE || part.strip_prefix("driver=") == Some(DEVICE);
    if !is_it(parts.peek()?) && !parts.clone().any(|part| part == "driver=vmgenid") {
        return None;
    }
    let kept: Vec<&str> = parts.filter(|part| !part.starts_with("guid=")).collect();
    Some(format!("{},guid={id}", kept.join(",")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_is_told_the_id_that_the_guest_sees() {
        let told = |device: &str| {
            let offer =
                json!({ "binary": "vmgenid", "args": ["-name", "vmgenid", "-device", device, "-m", "1G"] });
            let offer: Value = serde_json::from_str(&with_id(&offer.to_string(), "7")).unwrap();
            assert_eq!(
                (offer["binary"].as_str(), offer["args"][1].as_str()),
                (Some("vmgenid"), Some("vmgenid"))
            );
            offer["args"][3].as_str().unwrap().to_owned()
        };
        assert_eq!(told("vmgenid"), "vmgenid,guid=7");
        assert_eq!(told("vmgenid,guid=auto,id=gen"), "vmgenid,id=gen,guid=7");
        assert_eq!(told("id=gen,driver=vmgenid"), "id=gen,driver=vmgenid,guid=7");
        assert_eq!(told(r#"{"driver":"vmgenid","guid":"auto"}"#), r#"{"driver":"vmgenid","guid":"7"}"#);
        for other in ["virtio-rng-pci,id=vmgenid", r#"{"driver":"virtio-rng-pci"}"#] {
            assert_eq!(told(other), other);
        }
        assert_eq!(with_id("no offer", "7"), "no offer");
    }
}
