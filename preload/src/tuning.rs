//! The settings of QEMU's own migration: what its user has set is set aside while vmemd uses it, and put back.
//!
//! Left behind, `x-ignore-shared` would keep guest memory out of every later `savevm`, without an error; and what the
//! user has set for a migration of his own (`multifd`, `mapped-ram`, TLS) is in the way of ours.

use serde_json::{Map, Value, json};

/// As fast as can be: nothing leaves this machine.
const BYTES_PER_SECOND: u64 = 1 << 40;
const DOWNTIME_LIMIT_MS: u64 = 1_000_000;

/// The questions to QEMU whose answers are the settings.
pub(crate) const QUESTIONS: [&str; 2] = ["query-migrate-capabilities", "query-migrate-parameters"];
/// The commands that set them.
pub(crate) const COMMANDS: [&str; 2] = ["migrate-set-capabilities", "migrate-set-parameters"];

/// Parameters as our migration needs them. Others do not matter to it, because no capability that uses them is on.
fn wanted() -> [(&'static str, Value); 8] {
    [
        ("max-bandwidth", json!(BYTES_PER_SECOND)),
        ("avail-switchover-bandwidth", json!(0)),
        ("downtime-limit", json!(DOWNTIME_LIMIT_MS)),
        ("tls-creds", json!("")),
        ("tls-hostname", json!("")),
        ("mode", json!("normal")),
        ("direct-io", json!(false)),
        ("zero-page-detection", json!("legacy")),
    ]
}

/// The settings as they were, as far as ours differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tuning {
    capabilities: Vec<(String, bool)>,
    parameters: Map<String, Value>,
}

impl Tuning {
    /// From QEMU's answers to [`QUESTIONS`]: what it takes to have only these capabilities.
    pub(crate) fn new(capabilities: &Value, parameters: &Value, on: &[&str]) -> Tuning {
        let known =
            capabilities.as_array().into_iter().flatten().filter_map(|known| {
                Some((known["capability"].as_str()?.to_owned(), known["state"].as_bool()?))
            });
        let mut capabilities: Vec<(String, bool)> = known.collect();
        for name in on {
            // QEMU then says itself that it does not know it.
            if !capabilities.iter().any(|(known, _)| known == name) {
                capabilities.push(((*name).to_owned(), false));
            }
        }
        capabilities.retain(|(name, state)| on.contains(&name.as_str()) != *state);
        let known = |(name, want): (&'static str, Value)| {
            let has = parameters.get(name).filter(|has| **has != want)?;
            Some((name.to_owned(), has.clone()))
        };
        Tuning { capabilities, parameters: wanted().into_iter().filter_map(known).collect() }
    }

    /// Arguments of [`COMMANDS`] that set what ours needs.
    pub(crate) fn ours(&self) -> [Value; 2] {
        let names = self.parameters.keys();
        let mut wanted: Map<String, Value> =
            wanted().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let parameters: Map<String, Value> =
            names.filter_map(|name| Some((name.clone(), wanted.remove(name)?))).collect();
        [self.states(|state| !state), Value::Object(parameters)]
    }

    /// The same to put back what was there.
    pub(crate) fn theirs(&self) -> [Value; 2] {
        [self.states(|state| state), Value::Object(self.parameters.clone())]
    }

    fn states(&self, of: impl Fn(bool) -> bool) -> Value {
        let states = self.capabilities.iter();
        let states: Vec<Value> =
            states.map(|(name, state)| json!({ "capability": name, "state": of(*state) })).collect();
        json!({ "capabilities": states })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_is_put_back() {
        let state = |name: &str, state: bool| json!({ "capability": name, "state": state });
        let capabilities =
            json!([state("multifd", true), state("x-ignore-shared", false), state("events", true)]);
        let parameters =
            json!({ "max-bandwidth": 1, "tls-creds": "t", "mode": "normal", "announce-max": 550 });
        let tuning = Tuning::new(&capabilities, &parameters, &["x-ignore-shared", "new"]);
        let [capabilities, parameters] = tuning.ours();
        let all = ["multifd", "x-ignore-shared", "events", "new"];
        let states =
            |on: &[bool]| -> Vec<Value> { all.iter().zip(on).map(|(name, on)| state(name, *on)).collect() };
        assert_eq!(capabilities["capabilities"], json!(states(&[false, true, false, true])));
        assert_eq!(parameters, json!({ "max-bandwidth": BYTES_PER_SECOND, "tls-creds": "" }));
        let [capabilities, parameters] = tuning.theirs();
        assert_eq!(capabilities["capabilities"], json!(states(&[true, false, true, false])));
        assert_eq!(parameters, json!({ "max-bandwidth": 1, "tls-creds": "t" }));
    }

    #[test]
    fn what_is_right_already_is_left_alone() {
        let tuning = Tuning::new(&json!([]), &json!({}), &[]);
        assert_eq!(tuning.ours(), [json!({ "capabilities": [] }), json!({})]);
        assert_eq!(Tuning::new(&Value::Null, &Value::Null, &[]), tuning);
    }
}
