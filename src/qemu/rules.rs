//! How names of other hosts' command lines are called here.
//!
//! ```toml
//! [[map]]
//! from = "/srv/images"
//! to = "/mnt/images"
//!
//! [[map]]
//! kind = "tap"        # or "bridge"; without it paths
//! from = "tap0"
//! to = "vm-tap0"
//! ```

use std::path::Path;

use serde::Deserialize;
use toml::Spanned;
use vmprocess::failure::{Failure, FailureKind};

use super::resources::what::What;

/// The names that a rule is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Names {
    #[default]
    Path,
    Tap,
    Bridge,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    #[serde(default)]
    kind: Names,
    from: String,
    to: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    map: Vec<Spanned<Rule>>,
}

/// The rules of a host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    rules: Vec<Rule>,
}

impl Rules {
    /// Reads a file of rules.
    pub fn read(path: &Path) -> Result<Rules, Failure> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Failure::io(format_args!("reading the rules in {}", path.display()), &error))?;
        Rules::parse(&text, &path.display().to_string())
    }

    /// `file` is for errors.
    pub fn parse(text: &str, file: &str) -> Result<Rules, Failure> {
        let bad = |at: usize, why: &str| {
            let before = text.get(..at).unwrap_or(text);
            let line = before.matches('\n').count() + 1;
            Failure::new(FailureKind::Usage, format!("{file}:{line}: {why}"))
        };
        let document: Document = toml::from_str(text)
            .map_err(|error| bad(error.span().map_or(0, |span| span.start), error.message()))?;
        let mut rules = Rules::default();
        for rule in document.map {
            let at = rule.span().start;
            rules.add(rule.into_inner()).map_err(|why| bad(at, &why))?;
        }
        Ok(rules)
    }

    fn add(&mut self, mut rule: Rule) -> Result<(), String> {
        if rule.kind == Names::Path {
            for path in [&mut rule.from, &mut rule.to] {
                if !path.starts_with('/') {
                    return Err(format!("{path:?} is not an absolute path"));
                }
                // A slash at the end would be a part of every match.
                path.truncate(path.trim_end_matches('/').len());
            }
        } else if rule.from.is_empty() || rule.to.is_empty() || rule.to.contains('/') {
            return Err(format!("{:?} to {:?}: write names of interfaces", rule.from, rule.to));
        }
        if self.rules.iter().any(|other| other.kind == rule.kind && other.from == rule.from) {
            return Err(format!("there is a rule for {:?} already", rule.from));
        }
        self.rules.push(rule);
        Ok(())
    }

    /// The name here of something that another host calls `name`, if a rule says so. Of paths, the longest prefix of
    /// whole components counts.
    pub fn apply(&self, what: What, name: &str) -> Option<String> {
        let kind = match what {
            What::Tap | What::TapMade => Names::Tap,
            What::Bridge => Names::Bridge,
            what if what.is_path() => return self.path(name),
            _ => return None,
        };
        self.rules.iter().find(|rule| rule.kind == kind && rule.from == name).map(|rule| rule.to.clone())
    }

    /// A path as it is called here.
    pub fn path(&self, name: &str) -> Option<String> {
        let rest = |rule: &Rule| {
            let rest = name.strip_prefix(rule.from.as_str())?;
            (rest.is_empty() || rest.starts_with('/')).then(|| rest.to_owned())
        };
        let paths = self.rules.iter().filter(|rule| rule.kind == Names::Path);
        let (rule, rest) = paths
            .filter_map(|rule| rest(rule).map(|rest| (rule, rest)))
            .max_by_key(|(rule, _)| rule.from.len())?;
        Some(format!("{}{rest}", rule.to))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::options::CommandLine;
    use crate::qemu::resources;
    use proptest::prelude::*;

    const TEXT: &str = r#"# of this host
[[map]]
from = "/srv/images/"
to = "/mnt/images"

[[map]]
from = "/srv"
to = "/data"

[[map]]
kind = "tap"
from = "tap0"
to = "tap7"

[[map]]
kind = "bridge"
from = "br0"
to = "virbr0"
"#;

    #[test]
    fn command_lines_are_mapped() {
        let rules = Rules::parse(TEXT, "rules").unwrap();
        let words: Vec<_> =
            "-drive file=/srv/images/a.img,if=virtio -kernel /srv/images2/k -append /srv/images/x \
                             -netdev tap,id=n,ifname=tap0,script=no -netdev bridge,id=b,br=br0 -serial \
                             unix:/srv/run/s,server=on,wait=off -device x,romfile=/other/r -cdrom /srv/images"
                .split_whitespace()
                .collect();
        let mut line = CommandLine::parse(&words).unwrap();
        resources::map(&mut line, &rules).unwrap();
        assert_eq!(
            line.print().join(" "),
            "-drive file=/mnt/images/a.img,if=virtio -kernel /data/images2/k -append /srv/images/x -netdev \
             tap,id=n,ifname=tap7,script=no -netdev bridge,id=b,br=virbr0 -serial \
             unix:/data/run/s,server=on,wait=off -device x,romfile=/other/r -cdrom /mnt/images"
        );
    }

    #[test]
    fn everything_can_be_mapped() {
        let rules = Rules::parse("[[map]]\nfrom = \"/\"\nto = \"/jail\"\n", "rules").unwrap();
        assert_eq!(rules.path("/a/b").as_deref(), Some("/jail/a/b"));
        assert_eq!(rules.path("a"), None);
    }

    #[test]
    fn rules_that_mean_nothing_are_refused() {
        for (kind, from, to, says) in [
            ("path", "a", "/b", "\"a\" is not an absolute path"),
            ("path", "/a", "b", "\"b\" is not an absolute path"),
            ("tap", "", "b", "write names of interfaces"),
            ("path", "/srv", "/x", "there is a rule for \"/srv\" already"),
        ] {
            let text = format!("{TEXT}[[map]]\nkind = \"{kind}\"\nfrom = \"{from}\"\nto = \"{to}\"\n");
            let error = Rules::parse(&text, "rules").unwrap_err();
            assert!(error.text.contains(says), "{error}");
        }
    }

    #[test]
    fn mistakes_have_a_line() {
        for (text, says) in [
            ("[[map]]\nfrom = \"/a\"\n", "rules:1: missing field `to`"),
            ("\n[[map]]\nfrom = \"/a\"\nto = \"/b\"\nwith = 1\n", "rules:5: unknown field `with`"),
            ("\n\n[[map]\n", "rules:3: "),
            (
                "[[map]]\nfrom = \"/a\"\nto = \"/b\"\n[[map]]\nfrom = \"a\"\nto = \"/b\"\n",
                "rules:4: \"a\" is not an absolute",
            ),
            ("[[map]]\nkind = \"tun\"\nfrom = \"a\"\nto = \"b\"\n", "rules:2: unknown variant `tun`"),
            ("[mapp]\n", "unknown field `mapp`"),
        ] {
            let error = Rules::parse(text, "rules").unwrap_err();
            assert!(error.text.contains(says), "{text}: {error}");
            assert_eq!(error.kind, FailureKind::Usage);
        }
        assert_eq!(Rules::parse("", "rules").unwrap(), Rules::default());
        let error = Rules::read(Path::new("/nowhere/rules.toml")).unwrap_err();
        assert!(error.text.starts_with("reading the rules in /nowhere/rules.toml: No such file"), "{error}");
    }

    proptest! {
        #[test]
        fn no_rules_are_too_strange(text in "(\\[\\[map\\]\\]|\n|from|to|=|\"|/a|.){0,30}", name in ".*") {
            if let Ok(rules) = Rules::parse(&text, "rules") {
                let _ = rules.path(&name);
            }
        }
    }
}
