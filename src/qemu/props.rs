//! The value of one option: `type,key=value,flag,…` with commas doubled inside values, or JSON.
//!
//! Both are read through dotted paths: `file.filename` is the key of that name, or the member of a member. QEMU's JSON
//! may have its strings in single quotes. What is not changed is printed as it was; JSON that is changed is printed
//! with its keys in order.

use serde_json::Value;
use vmprocess::size::Size;

/// An option's properties.
#[derive(Clone, Debug, PartialEq)]
pub enum Props {
    Text(Vec<Item>),
    Json(Value),
}

/// Between two commas: `key=value`, or a word alone, which is the type if it is the first and a flag otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    Pair { key: String, value: String },
    Alone(String),
}

/// A value to set, so that JSON gets the right type.
#[derive(Clone, Copy, Debug)]
pub(super) enum Set<'a> {
    Text(&'a str),
    On,
    Bytes(u64),
}

/// Whether a switch's value means on.
pub(super) fn is_on(value: &str) -> bool {
    matches!(value, "on" | "yes" | "true" | "y")
}

impl Props {
    /// Fails only for JSON that is none.
    pub fn parse(text: &str) -> Result<Props, String> {
        if text.starts_with('{') {
            return json(text).map(Props::Json);
        }
        let mut items = Vec::new();
        let mut rest = text;
        loop {
            let end = rest.find(['=', ',']).unwrap_or(rest.len());
            // Only the first word and what is behind a `=` can hold commas.
            let (item, taken) = match rest[end..].chars().next() {
                Some('=') => {
                    let (value, taken) = until_comma(&rest[end + 1..]);
                    (Item::Pair { key: rest[..end].to_owned(), value }, end + 1 + taken)
                }
                _ if items.is_empty() => {
                    let (word, taken) = until_comma(rest);
                    (Item::Alone(word), taken)
                }
                _ => (Item::Alone(rest[..end].to_owned()), end),
            };
            items.push(item);
            match rest.get(taken + 1..) {
                Some(next) => rest = next,
                None => return Ok(Props::Text(items)),
            }
        }
    }

    /// As an option's value.
    pub fn print(&self) -> String {
        match self {
            Props::Json(value) => value.to_string(),
            Props::Text(items) => {
                let one = |(at, item): (usize, &Item)| match item {
                    Item::Pair { key, value } => format!("{key}={}", value.replace(',', ",,")),
                    Item::Alone(word) if at == 0 => word.replace(',', ",,"),
                    Item::Alone(word) => word.clone(),
                };
                items.iter().enumerate().map(one).collect::<Vec<_>>().join(",")
            }
        }
    }

    /// The value under a dotted path; a flag alone is `on`, with `no` before it `off`. The last one counts.
    pub fn get(&self, path: &str) -> Option<String> {
        match self {
            Props::Json(value) => {
                path.split('.').try_fold(value, |value, key| value.get(key)).and_then(scalar)
            }
            Props::Text(items) => items.iter().enumerate().rev().find_map(|(at, item)| match item {
                Item::Pair { key, value } if key == path => Some(value.clone()),
                Item::Alone(word) if at > 0 && word == path => Some("on".to_owned()),
                Item::Alone(word) if at > 0 && word.strip_prefix("no") == Some(path) => {
                    Some("off".to_owned())
                }
                _ => None,
            }),
        }
    }

    /// The property whose name may be left out if it comes first.
    pub fn first(&self, key: &str) -> Option<String> {
        match self {
            Props::Text(items) => match items.first() {
                Some(Item::Alone(word)) if !word.is_empty() => self.get(key).or_else(|| Some(word.clone())),
                _ => self.get(key),
            },
            Props::Json(_) => self.get(key),
        }
    }

    /// What an `-object` is.
    pub(super) fn object(&self) -> Option<String> {
        self.first("qom-type")
    }

    pub(super) fn is_on(&self, path: &str) -> bool {
        self.get(path).is_some_and(|value| is_on(&value))
    }

    /// Sets a property that may come first without its name.
    pub(super) fn set_first(&mut self, key: &str, value: &str) {
        if self.get(key).is_none()
            && let Props::Text(items) = self
        {
            match items.first_mut() {
                Some(Item::Alone(word)) => *word = value.to_owned(),
                _ => items.insert(0, Item::Alone(value.to_owned())),
            }
            return;
        }
        self.set(key, Set::Text(value));
    }

    /// Sets a property of the outermost level, in its place or at the end.
    pub(super) fn set(&mut self, key: &str, value: Set<'_>) {
        match self {
            Props::Json(Value::Object(members)) => {
                let value = match value {
                    Set::Text(text) => text.into(),
                    Set::On => true.into(),
                    Set::Bytes(bytes) => bytes.into(),
                };
                members.insert(key.to_owned(), value);
            }
            Props::Json(_) => {}
            Props::Text(items) => {
                let value = match value {
                    Set::Text(text) => text.to_owned(),
                    Set::On => "on".to_owned(),
                    Set::Bytes(bytes) => Size(bytes).to_string(),
                };
                let same = |item: &Item| matches!(item, Item::Pair { key: has, .. } if has == key);
                if let Some(item) = items.iter_mut().rev().find(|item| same(item)) {
                    *item = Item::Pair { key: key.to_owned(), value };
                    return;
                }
                // A comma at the end and ours would make a doubled one.
                while items.last() == Some(&Item::Alone(String::new())) {
                    items.pop();
                }
                items.push(Item::Pair { key: key.to_owned(), value });
            }
        }
    }

    /// Removes a property of the outermost level.
    pub(super) fn remove(&mut self, key: &str) {
        match self {
            Props::Json(Value::Object(members)) => drop(members.remove(key)),
            Props::Json(_) => {}
            Props::Text(items) => {
                let mut at = 0;
                items.retain(|item| {
                    at += 1;
                    match item {
                        Item::Pair { key: has, .. } => has != key,
                        // An empty word between two others would read as a doubled comma.
                        Item::Alone(word) => {
                            at == 1
                                || !(word.is_empty() || word == key || word.strip_prefix("no") == Some(key))
                        }
                    }
                });
            }
        }
    }

    /// Shows every text value with its dotted path (empty for the first word alone), and puts what is given back in
    /// its place. True if anything was.
    pub(super) fn visit(&mut self, see: &mut dyn FnMut(&str, &str) -> Option<String>) -> bool {
        match self {
            Props::Json(value) => visit_json("", value, see),
            Props::Text(items) => {
                let mut changed = false;
                for (at, item) in items.iter_mut().enumerate() {
                    let (path, value) = match item {
                        Item::Pair { key, value } => (key.as_str(), value),
                        Item::Alone(word) if at == 0 => ("", word),
                        Item::Alone(_) => continue,
                    };
                    if let Some(new) = see(path, value) {
                        changed |= new != *value;
                        *value = new;
                    }
                }
                changed
            }
        }
    }
}

/// JSON as QEMU reads it: the standard's, and strings in single quotes.
pub(super) fn json(text: &str) -> Result<Value, String> {
    let read = |text: &str| serde_json::from_str(text).map_err(|error| format!("it is not JSON ({error})"));
    if text.contains('\'') { read(&double_quoted(text)) } else { read(text) }
}

/// Strings in single quotes get double ones. In both kinds `\'` stands for a single quote.
fn double_quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut within = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (within, c) {
            (None, '\'' | '"') => {
                within = Some(c);
                out.push('"');
            }
            (Some(quote), c) if c == quote => {
                within = None;
                out.push('"');
            }
            (Some(_), '"') => out.push_str("\\\""),
            (Some(_), '\\') => match chars.next() {
                Some('\'') => out.push('\''),
                next => {
                    out.push('\\');
                    out.extend(next);
                }
            },
            (_, c) => out.push(c),
        }
    }
    out
}

/// Up to a comma that is not doubled: the text, and how many bytes it took.
fn until_comma(text: &str) -> (String, usize) {
    let mut value = String::new();
    let mut rest = text;
    loop {
        let end = rest.find(',').unwrap_or(rest.len());
        value.push_str(&rest[..end]);
        match rest[end..].strip_prefix(",,") {
            Some(next) => {
                value.push(',');
                rest = next;
            }
            None => return (value, text.len() - rest.len() + end),
        }
    }
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(on) => Some(if *on { "on" } else { "off" }.to_owned()),
        Value::Number(number) => Some(number.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}

fn visit_json(path: &str, value: &mut Value, see: &mut dyn FnMut(&str, &str) -> Option<String>) -> bool {
    let below = |key: &str| if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") };
    match value {
        Value::String(text) => match see(path, text) {
            Some(new) => {
                let changed = new != *text;
                *text = new;
                changed
            }
            None => false,
        },
        Value::Array(list) => {
            let mut changed = false;
            for (at, value) in list.iter_mut().enumerate() {
                changed |= visit_json(&below(&at.to_string()), value, see);
            }
            changed
        }
        Value::Object(members) => {
            let mut changed = false;
            for (key, value) in members {
                changed |= visit_json(&below(key), value, see);
            }
            changed
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(text: &str) -> Props {
        Props::parse(text).unwrap()
    }

    #[test]
    fn text_and_json_say_the_same() {
        let json = r#"{"driver":"qcow2","read-only":true,"cache":{"direct":true},"file":{"driver":"file","filename":"/a,b"},"n":7}"#;
        for props in [
            parse(json),
            parse("qcow2,read-only=on,cache.direct=on,file.driver=file,file.filename=/a,,b,n=7"),
        ] {
            assert_eq!(props.first("driver").as_deref(), Some("qcow2"));
            assert_eq!(props.get("file.filename").as_deref(), Some("/a,b"));
            assert_eq!(props.get("n").as_deref(), Some("7"));
            assert!(props.is_on("read-only") && props.is_on("cache.direct") && !props.is_on("file.driver"));
            assert_eq!(props.get("missing"), None);
        }
    }

    #[test]
    fn flags_alone_are_switches_and_the_last_word_counts() {
        let props = parse("socket,server,nowait,id=a,id=b");
        assert_eq!(props.get("server").as_deref(), Some("on"));
        assert_eq!(props.get("wait").as_deref(), Some("off"));
        assert_eq!(props.get("id").as_deref(), Some("b"));
        assert_eq!(props.get("socket"), None, "the first word is the type");
    }

    #[test]
    fn the_first_word_can_hold_commas() {
        assert_eq!(parse("a,,b,c=d").first("x").as_deref(), Some("a,b"));
        assert_eq!(parse("x=1,y").first("x").as_deref(), Some("1"));
    }

    #[test]
    fn setting_keeps_everything_else() {
        let mut props = parse("memory-backend-ram,id=a,share=off,");
        props.set_first("qom-type", "memory-backend-file");
        props.set("share", Set::On);
        props.set("mem-path", Set::Text("/a,b"));
        props.set("align", Set::Bytes(2 << 20));
        assert_eq!(props.print(), "memory-backend-file,id=a,share=on,mem-path=/a,,b,align=2M");
        props.remove("share");
        props.remove("align");
        assert_eq!(props.print(), "memory-backend-file,id=a,mem-path=/a,,b");

        let mut props = parse("qom-type=x,id=a");
        props.set_first("qom-type", "y");
        assert_eq!(props.print(), "qom-type=y,id=a");
        let mut props = parse("accel=kvm");
        props.set_first("type", "q35");
        assert_eq!(props.print(), "q35,accel=kvm");

        let mut props = parse(r#"{"qom-type":"x","share":false}"#);
        props.set_first("qom-type", "y");
        props.set("share", Set::On);
        props.set("align", Set::Bytes(2 << 20));
        props.remove("none");
        assert_eq!(props.print(), r#"{"align":2097152,"qom-type":"y","share":true}"#);
    }

    #[test]
    fn json_that_is_none_says_so() {
        for text in ["{", "{'driver':'x}", "{'driver':\"x'}", "{'a':'b\\", &"{\"a\":".repeat(5000)] {
            assert!(Props::parse(text).unwrap_err().starts_with("it is not JSON"), "{text}");
        }
    }

    #[test]
    fn json_in_single_quotes_is_read_as_qemu_does() {
        for (text, filename) in [
            (r#"{'driver':'file','filename':'/a,b'}"#, "/a,b"),
            (r#"{'driver':"file",'filename':'a"b'}"#, "a\"b"),
            (r#"{"driver":'file',"filename":"it's"}"#, "it's"),
            (r#"{'driver':'file','filename':'it\'s \"\\'}"#, "it's \"\\"),
            (r#"{"driver":"file","filename":"it\'s"}"#, "it's"),
            (r#"{'driver':'file','filename':'\u00e4ä'}"#, "ää"),
        ] {
            let mut props = parse(text);
            assert_eq!(props.get("filename").as_deref(), Some(filename), "{text}");
            assert_eq!(props.first("driver").as_deref(), Some("file"), "{text}");
            props.set("x", Set::On);
            assert_eq!(parse(&props.print()).get("filename").as_deref(), Some(filename), "{text}");
        }
    }

    #[test]
    fn visiting_replaces_what_it_is_told() {
        for (text, after) in [
            ("file=/a,,b,file.filename=/c,x", "file=/T,file.filename=/c,x"),
            (r#"{"file":["/a,b"]}"#, r#"{"file":["/T"]}"#),
        ] {
            let mut props = parse(text);
            assert!(props.visit(&mut |_, value| (value == "/a,b").then(|| "/T".to_owned())));
            assert_eq!(props.print(), after);
            assert!(!props.visit(&mut |_, _| None));
        }
    }

    proptest! {
        #[test]
        fn what_is_not_changed_prints_as_it_was(text in "([a-z]{0,3}|=|,|,,|\\.|é){0,20}") {
            prop_assert_eq!(parse(&text).print(), text);
        }

        #[test]
        fn what_is_set_reads_back(text in "([a-z]{0,3}|=|,|,,){0,12}", value in "([a-z]|,|=|\\PC){0,6}") {
            let mut props = parse(&text);
            props.set("key", Set::Text(&value));
            let again = parse(&props.print());
            prop_assert_eq!(again.get("key"), Some(value));
        }

        #[test]
        fn no_text_is_too_strange(text in "\\{?.*|\\{(['\"\\\\:,a]){0,12}\\}") {
            if let Ok(mut props) = Props::parse(&text) {
                props.set_first("type", &text);
                props.set("x", Set::On);
                props.remove("y");
                props.visit(&mut |_, value| Some(format!("{value},")));
                let _ = (props.get("a.b"), props.first("c"), props.print());
            }
        }
    }
}
