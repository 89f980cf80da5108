//! A rewritten command line for those whose QEMU is started by something else: a shell, a script, libvirt.

use std::path::Path;

use serde_json::json;

use super::rewrite::Rewritten;

/// How `vmemd qemu-args` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Shell,
    Json,
    Libvirt,
}

/// The command line with its environment, as one text that ends with a line feed.
pub fn print(format: Format, binary: &Path, made: &Rewritten, environment: &[(&str, String)]) -> String {
    match format {
        Format::Shell => shell(binary, made, environment),
        Format::Json => in_json(binary, made, environment),
        Format::Libvirt => libvirt(made, environment),
    }
}

fn shell(binary: &Path, made: &Rewritten, environment: &[(&str, String)]) -> String {
    let set = environment.iter().map(|(name, value)| format!("{name}={}", quoted(value)));
    let words = [binary.display().to_string()];
    let words = words.iter().chain(&made.args).map(|word| quoted(word));
    set.chain(words).collect::<Vec<_>>().join(" ") + "\n"
}

/// A word that every POSIX shell reads as this text.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./,:=+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn in_json(binary: &Path, made: &Rewritten, environment: &[(&str, String)]) -> String {
    let backends: Vec<_> = made
        .backends
        .iter()
        .map(|backend| json!({"id": backend.id, "bytes": backend.size, "prealloc": backend.prealloc, "node": backend.node}))
        .collect();
    let environment: serde_json::Map<_, _> =
        environment.iter().map(|(name, value)| ((*name).to_owned(), value.clone().into())).collect();
    let whole = json!({
        "binary": binary.display().to_string(),
        "args": made.args,
        "env": environment,
        "backends": backends,
        "memory": made.memory,
        "machine": made.machine,
        "notes": made.notes,
    });
    format!("{whole:#}\n")
}

/// What a domain's XML needs: libvirt makes the command line itself, so ours is added behind it. Wants a command line
/// made by [`LinePlan::appended`](super::rewrite::LinePlan::appended).
fn libvirt(made: &Rewritten, environment: &[(&str, String)]) -> String {
    let mut text = String::from(
        "<!-- In the domain: <domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>, no\n     \
         <memoryBacking> but <nosharepages/>, no <hostdev>, and one NUMA node. -->\n<qemu:commandline>\n",
    );
    for arg in &made.added {
        text += &format!("  <qemu:arg value='{}'/>\n", escaped(arg));
    }
    for (name, value) in environment {
        text += &format!("  <qemu:env name='{name}' value='{}'/>\n", escaped(value));
    }
    text + "</qemu:commandline>\n"
}

/// Text between single quotes of XML.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&apos;"),
            '"' => out.push_str("&quot;"),
            '\n' | '\t' | '\r' => out.push_str(&format!("&#{};", c as u32)),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qemu::options::CommandLine;
    use crate::qemu::rewrite::{LinePlan, Monitor, Role, Settings};
    use proptest::prelude::*;
    use std::path::PathBuf;
    use std::process::Command;

    fn made() -> Rewritten {
        let line = CommandLine::parse(&["-m", "1G", "-name", "it's"]).unwrap();
        let files = [PathBuf::from("/dev/shm/vmemd-db-0")];
        let settings = Settings {
            files: &files,
            monitor: Monitor::Socket(Path::new("/run/vmemd/.monitors/db.qmp")),
            role: Role::Start,
        };
        LinePlan::appended(&line).unwrap().rewrite(&settings).unwrap()
    }

    fn printed(format: Format) -> String {
        let environment = [
            ("LD_PRELOAD", "/usr/lib/vmemd/libvmemd_preload.so".to_owned()),
            ("VMEMD_PRELOAD", r#"{"name":"db"}"#.to_owned()),
        ];
        print(format, Path::new("/usr/bin/qemu-system-x86_64"), &made(), &environment)
    }

    #[test]
    fn for_a_shell() {
        assert_eq!(
            printed(Format::Shell),
            "LD_PRELOAD=/usr/lib/vmemd/libvmemd_preload.so VMEMD_PRELOAD='{\"name\":\"db\"}' /usr/bin/qemu-system-x86_64 -m \
             1G -name 'it'\\''s' -object memory-backend-file,id=vmemd-ram0,size=1G,mem-path=/dev/shm/vmemd-db-0,\
             share=on,align=2M -machine memory-backend=vmemd-ram0 -chardev \
             socket,id=vmemd-qmp,path=/run/vmemd/.monitors/db.qmp,server=on,wait=off -mon chardev=vmemd-qmp,mode=control\n"
        );
    }

    #[test]
    fn for_programs() {
        let whole: serde_json::Value = serde_json::from_str(&printed(Format::Json)).unwrap();
        assert_eq!(whole["binary"], "/usr/bin/qemu-system-x86_64");
        assert_eq!(whole["args"][3], "it's");
        assert_eq!(whole["env"]["VMEMD_PRELOAD"], r#"{"name":"db"}"#);
        assert_eq!(whole["backends"][0]["bytes"], 1u64 << 30);
        assert_eq!(whole["memory"], 1u64 << 30);
    }

    #[test]
    fn for_libvirt() {
        let text = printed(Format::Libvirt);
        for part in [
            "<qemu:arg value='-object'/>\n",
            "<qemu:arg value='memory-backend=vmemd-ram0'/>\n",
            "<qemu:env name='LD_PRELOAD' value='/usr/lib/vmemd/libvmemd_preload.so'/>\n",
            "<qemu:env name='VMEMD_PRELOAD' value='{&quot;name&quot;:&quot;db&quot;}'/>\n",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("-name"), "only what is added: {text}");
        assert_eq!(escaped("a<b>&'\"\n"), "a&lt;b&gt;&amp;&apos;&quot;&#10;");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn a_shell_reads_the_words_again(words in proptest::collection::vec("[^\0]{0,12}", 1..5)) {
            let line: Vec<String> = words.iter().map(|word| quoted(word)).collect();
            let script = format!("printf '%s\\0' {}", line.join(" "));
            let output = Command::new("/bin/sh").args(["-c", &script]).output().unwrap();
            let read = String::from_utf8(output.stdout).unwrap();
            prop_assert_eq!(read, words.iter().map(|word| format!("{word}\0")).collect::<String>());
        }
    }
}
