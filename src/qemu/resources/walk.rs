//! The walk over a command line that finds what lives outside of it, and may give it another name.

use std::path::{Path, PathBuf};

use vmprocess::failure::Failure;

use super::what::{SeeOne, What};
use super::{descriptors, files};
use crate::qemu::options::{CommandLine, Word};
use crate::qemu::props::{Props, is_on};
use crate::qemu::rules::Rules;

/// One thing outside, and the option that names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resource {
    pub what: What,
    pub name: String,
    pub option: String,
}

/// Everything outside that a command line names, in its order.
pub fn list(line: &CommandLine) -> Result<Vec<Resource>, Failure> {
    let mut found = Vec::new();
    // The walk may write, so it walks a copy.
    visit(&mut line.clone(), &mut |what, name, option| {
        found.push(Resource { what, name: name.to_owned(), option: option.to_owned() });
        None
    })?;
    Ok(found)
}

/// The files that are disks, by their absolute paths.
pub(in crate::qemu) fn disks(line: &CommandLine) -> Result<Vec<PathBuf>, Failure> {
    let list = list(line)?.into_iter().filter(|found| matches!(found.what, What::Disk | What::Descriptor));
    Ok(list.map(|found| PathBuf::from(found.name)).filter(|path| path.is_absolute()).collect())
}

/// The line with other files for some of its disks, each by its old and its new name.
pub(in crate::qemu) fn with_other_disks(
    line: &CommandLine,
    names: &[(String, String)],
) -> Result<CommandLine, Failure> {
    let mut line = line.clone();
    visit(&mut line, &mut |what, name, _| {
        let found = names.iter().find(|(old, _)| what == What::Disk && old == name);
        found.map(|(_, new)| new.clone())
    })?;
    Ok(line)
}

/// Rewrites relative paths for a process that runs in another directory, on another host. A link to a descriptor of
/// QEMU's becomes that descriptor: of the link nobody else could tell.
pub fn absolute(line: &mut CommandLine, directory: &Path) -> Result<(), Failure> {
    rename(line, &mut |what, name| {
        let path = directory.join(name);
        let descriptor = descriptors::behind(&path).map(|path| path.to_string_lossy().into_owned());
        descriptor.or_else(|| absolute_name(what, name, directory))
    })
}

/// The same for a process that another starts on this host, from whatever directory: a socket's path stays as it is
/// where it would get too long.
pub fn from_anywhere(line: &mut CommandLine, directory: &Path) -> Result<(), Failure> {
    rename(line, &mut |what, name| {
        absolute_name(what, name, directory).filter(|path| !what.is_socket() || fits_a_socket(path))
    })
}

fn absolute_name(what: What, name: &str, directory: &Path) -> Option<String> {
    let of_qemu = what == What::Firmware && !name.contains('/');
    let relative = what.is_path() && !name.starts_with('/') && !of_qemu;
    relative.then(|| directory.join(name).to_string_lossy().into_owned())
}

/// QEMU's own limit of a socket's path.
pub(in crate::qemu) const SOCKET_PATH_MAX: usize = 108;

pub(super) fn fits_a_socket(path: &str) -> bool {
    path.len() <= SOCKET_PATH_MAX
}

fn rename(line: &mut CommandLine, name: &mut dyn FnMut(What, &str) -> Option<String>) -> Result<(), Failure> {
    visit(line, &mut |what, old, _| if what.is_path() && !old.is_empty() { name(what, old) } else { None })
}

/// Rewrites names by the rules of this host.
pub fn map(line: &mut CommandLine, rules: &Rules) -> Result<(), Failure> {
    visit(line, &mut |what, name, _| rules.apply(what, name))
}

/// As [`SeeOne`], with the option as written.
type See<'a> = &'a mut dyn FnMut(What, &str, &str) -> Option<String>;

fn visit(line: &mut CommandLine, see: See<'_>) -> Result<(), Failure> {
    for word in &mut line.words {
        let shown = word.shown();
        visit_word(word, &mut |what, name| match descriptors::named(name).filter(|_| what.is_path()) {
            Some(of_process) => see(of_process, name, &shown),
            None => see(what, name, &shown),
        })?;
    }
    Ok(())
}

fn visit_word(word: &mut Word, see: SeeOne<'_>) -> Result<(), Failure> {
    use What::{Device, Directory, File, Firmware, Output};
    let name = word.name().to_owned();
    match name.as_str() {
        "kernel" | "initrd" | "dtb" | "shim" => whole(word, File, see),
        "bios" => whole(word, Firmware, see),
        "D" | "pidfile" | "dump-vmstate" | "qtest-log" | "writeconfig" => whole(word, Output, see),
        "L" => whole(word, Directory, see),
        "hda" | "hdb" | "hdc" | "hdd" | "cdrom" | "fda" | "fdb" | "pflash" | "mtdblock" | "sd" => {
            word.value = word.value.take().map(|spec| files::disk(&spec, see).unwrap_or(spec));
        }
        name if is_character(name) => {
            word.value = word.value.take().map(|spec| character(&spec, see).unwrap_or(spec));
        }
        "enable-kvm" => drop(see(Device, "/dev/kvm")),
        "add-fd" => drop(see(What::Descriptor, word.value().unwrap_or_default())),
        "sdl" | "curses" => drop(see(What::Screen, &name)),
        "drive" | "blockdev" | "chardev" | "netdev" | "nic" | "net" | "object" | "device" | "machine"
        | "accel" | "option-rom" | "fsdev" | "virtfs" | "smbios" | "acpitable" | "fw_cfg" | "tpmdev"
        | "plugin" | "trace" | "audiodev" | "audio" | "vnc" | "spice" | "display" | "icount" | "set" => {
            let mut props = word.props()?;
            if visit_props(&name, &mut props, see) {
                word.value = Some(props.print());
            }
        }
        _ => {}
    }
    Ok(())
}

/// Options with a character device in the short form.
pub(in crate::qemu) fn is_character(option: &str) -> bool {
    matches!(
        option,
        "serial"
            | "parallel"
            | "monitor"
            | "qmp"
            | "qmp-pretty"
            | "qtest"
            | "debugcon"
            | "gdb"
            | "virtioconsole"
            | "redir"
    )
}

fn whole(word: &mut Word, what: What, see: SeeOne<'_>) {
    word.value = word.value.take().map(|path| see(what, &path).unwrap_or(path));
}

/// Properties that are a path by themselves, whatever stands beside them: option, type of object (any: empty),
/// property, kind.
const PATHS: &[(&str, &str, &str, What)] = &[
    ("object", "secret", "file", What::File),
    ("object", "tls-creds-x509", "dir", What::Directory),
    ("object", "tls-creds-psk", "dir", What::Directory),
    ("object", "tls-creds-anon", "dir", What::Directory),
    ("object", "tls-cipher-suites", "dir", What::Directory),
    ("object", "rng-random", "filename", What::Device),
    ("object", "authz-list-file", "filename", What::File),
    ("object", "pr-manager-helper", "path", What::Connects),
    ("object", "input-linux", "evdev", What::Device),
    ("object", "filter-dump", "file", What::Output),
    ("object", "iommufd", "fd", What::Descriptor),
    ("device", "", "romfile", What::Firmware),
    ("device", "loader", "file", What::File),
    ("device", "guest-loader", "kernel", What::File),
    ("device", "guest-loader", "initrd", What::File),
    ("device", "usb-mtp", "rootdir", What::Directory),
    ("device", "virtio-input-host-pci", "evdev", What::Device),
    ("device", "", "vhostfd", What::Descriptor),
    ("machine", "", "kernel", What::File),
    ("machine", "", "initrd", What::File),
    ("machine", "", "dtb", What::File),
    ("machine", "", "firmware", What::Firmware),
    ("machine", "", "dumpdtb", What::Output),
    ("fsdev", "", "path", What::Directory),
    ("fsdev", "", "socket", What::Connects),
    ("fsdev", "", "sock_fd", What::Descriptor),
    ("virtfs", "", "path", What::Directory),
    ("virtfs", "", "socket", What::Connects),
    ("virtfs", "", "sock_fd", What::Descriptor),
    ("smbios", "", "file", What::File),
    ("smbios", "", "path", What::File),
    ("fw_cfg", "", "file", What::File),
    ("tpmdev", "", "path", What::Device),
    ("tpmdev", "", "cancel-path", What::Device),
    ("plugin", "", "file", What::File),
    ("trace", "", "events", What::File),
    ("trace", "", "file", What::Output),
    ("audiodev", "", "path", What::Output),
    ("audio", "", "path", What::Output),
    ("display", "", "rendernode", What::Device),
    ("spice", "", "rendernode", What::Device),
    ("spice", "", "x509-dir", What::Directory),
    ("spice", "", "x509-key-file", What::File),
    ("spice", "", "x509-cert-file", What::File),
    ("spice", "", "x509-cacert-file", What::File),
    ("spice", "", "x509-dh-key-file", What::File),
    ("icount", "", "rrfile", What::File),
    ("option-rom", "", "romfile", What::Firmware),
];

fn visit_props(option: &str, props: &mut Props, see: SeeOne<'_>) -> bool {
    let kind_key = match option {
        "object" => "qom-type",
        "device" => "driver",
        _ => "type",
    };
    let kind = props.first(kind_key).unwrap_or_default();
    match option {
        "drive" | "blockdev" => return files::storage(option, props, see),
        "chardev" => return chardev(props, see),
        "netdev" | "nic" | "net" => return network(&kind, props, see),
        "device" if kind.starts_with("vhost-vsock") => drop(see(What::Device, "/dev/vhost-vsock")),
        "accel" | "machine" => {
            // `kvm:tcg` does without.
            let accel = if option == "accel" { props.first("accel") } else { props.get("accel") };
            if accel.as_deref() == Some("kvm") {
                see(What::Device, "/dev/kvm");
            }
        }
        "display" if matches!(kind.as_str(), "gtk" | "sdl" | "curses" | "cocoa" | "spice-app") => {
            see(What::Screen, &kind);
        }
        _ => {}
    }
    let spice_socket = option == "spice" && props.is_on("unix");
    props.visit(&mut |path, value| match (option, path) {
        // `unix:PATH` is the first word, or what `vnc=` says.
        ("vnc", "" | "vnc") | ("display", "vnc") => value
            .strip_prefix("unix:")
            .and_then(|socket| see(What::Listens, socket))
            .map(|socket| format!("unix:{socket}")),
        ("spice", "addr") if spice_socket => see(What::Listens, value),
        ("option-rom", "") => see(What::Firmware, value),
        ("plugin", "") => see(What::File, value),
        ("acpitable", "file" | "data") => each(value, ':', &mut |file| see(What::File, file)),
        ("set", key) => set(key, value, see),
        _ => {
            let fits = |row: &&(&str, &str, &str, What)| {
                row.0 == option && row.2 == path && (row.1.is_empty() || row.1 == kind)
            };
            PATHS.iter().find(fits).and_then(|row| see(row.3, value))
        }
    })
}

/// `-set group.id.argument=value`: the groups that hold paths.
fn set(key: &str, value: &str, see: SeeOne<'_>) -> Option<String> {
    let mut parts = key.splitn(3, '.');
    match (parts.next()?, parts.nth(1)?) {
        ("drive", "file") => files::disk(value, see),
        ("chardev", "path") => see(What::File, value),
        ("chardev", "logfile") => see(What::Output, value),
        ("device", "romfile") => see(What::Firmware, value),
        ("netdev", "ifname") => see(What::Tap, value),
        ("netdev", "br") => see(What::Bridge, value),
        _ => None,
    }
}

/// Each part of a list, put together again if one was changed.
fn each(list: &str, separator: char, see: &mut dyn FnMut(&str) -> Option<String>) -> Option<String> {
    let mut changed = false;
    let parts: Vec<String> = list
        .split(separator)
        .map(|part| {
            let new = see(part);
            changed |= new.is_some();
            new.unwrap_or_else(|| part.to_owned())
        })
        .collect();
    changed.then(|| parts.join(&separator.to_string()))
}

fn chardev(props: &mut Props, see: SeeOne<'_>) -> bool {
    // JSON has the backend as a member, with its settings below.
    let kind = props.first("backend").or_else(|| props.get("backend.type")).unwrap_or_default();
    let server = props.get("server").or_else(|| props.get("backend.data.server"));
    // Text does not listen unless told, JSON listens unless told.
    let listens = server.map_or(matches!(props, Props::Json(_)), |value| is_on(&value));
    let is_abstract = props.is_on("abstract") || props.is_on("backend.data.addr.data.abstract");
    let connects = connects(props, "backend.data.");
    props.visit(&mut |path, value| {
        let what = match (kind.as_str(), path.rsplit('.').next().unwrap_or(path)) {
            (_, "logfile") => What::Output,
            ("socket", "fd") => What::Descriptor,
            ("socket", "path") if is_abstract => return None,
            ("socket", "path") if listens => What::Listens,
            ("socket", "path") => connects,
            ("socket", "str") => What::Descriptor,
            ("file", "path" | "out") => What::Output,
            ("file", "input-path" | "in") => What::File,
            ("pipe" | "serial" | "tty" | "parallel" | "parport", "path" | "device") => What::Device,
            _ => return None,
        };
        see(what, value)
    })
}

/// How a client comes to its socket. JSON has the settings of a character device deeper down.
fn connects(props: &Props, deeper: &str) -> What {
    let again = ["reconnect", "reconnect-ms"].iter().any(|key| {
        let said = props.get(key).or_else(|| props.get(&format!("{deeper}{key}")));
        said.is_some_and(|every| every.trim_start_matches('0').starts_with(|c: char| c.is_ascii_digit()))
    });
    if again { What::Reconnects } else { What::Connects }
}

/// A character device in the short form of `-serial` and its kin.
fn character(spec: &str, see: SeeOne<'_>) -> Option<String> {
    let (before, spec) = match spec.strip_prefix("mon:") {
        Some(rest) => ("mon:", rest),
        None => ("", spec),
    };
    if spec.starts_with("/dev/") {
        return see(What::Device, spec).map(|path| format!("{before}{path}"));
    }
    let (kind, rest) = spec.split_once(':')?;
    let end = rest.find(',').unwrap_or(rest.len());
    let (path, options) = rest.split_at(end);
    let what = match kind {
        "unix" => match Props::parse(&format!("unix{options}")) {
            Ok(options) if options.is_on("abstract") => return None,
            Ok(options) if options.is_on("server") => What::Listens,
            Ok(options) => connects(&options, ""),
            Err(_) => What::Connects,
        },
        "file" => What::Output,
        "pipe" => What::Device,
        _ => return None,
    };
    see(what, path).map(|path| format!("{before}{kind}:{path}{options}"))
}

fn network(kind: &str, props: &mut Props, see: SeeOne<'_>) -> bool {
    if kind == "tap"
        && props.is_on("vhost")
        && props.get("vhostfd").is_none()
        && props.get("vhostfds").is_none()
    {
        see(What::Device, "/dev/vhost-net");
    }
    // A tap that no script connects is of use only if somebody has made and connected it before.
    let lonely = props.get("script").as_deref() == Some("no");
    let listens = props.is_on("server");
    let connects = connects(props, "");
    let bridged = kind == "bridge" || props.get("br").is_some() || props.get("helper").is_some();
    if bridged && props.get("br").is_none() {
        see(What::Bridge, "br0");
    }
    props.visit(&mut |path, value| {
        let what = match (kind, path) {
            ("tap", "ifname") if lonely => What::Tap,
            ("tap", "ifname") => What::TapMade,
            ("tap", "script" | "downscript") if value != "no" && !value.is_empty() => What::Program,
            ("tap" | "bridge", "helper") => What::Program,
            ("tap" | "bridge", "br") => What::Bridge,
            ("vde", "sock") => What::Connects,
            ("user", "tftp" | "smb") => What::Directory,
            ("stream", "addr.path") if listens => What::Listens,
            ("stream", "addr.path") => connects,
            ("dgram", "remote.path") => What::Connects,
            ("dgram", "local.path") => What::Listens,
            ("stream", "addr.str") | ("dgram", "local.str") => What::Descriptor,
            (_, "fd" | "fds" | "vhostfd" | "vhostfds") => What::Descriptor,
            _ => return None,
        };
        see(what, value)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn line(text: &str) -> CommandLine {
        CommandLine::parse(&text.split_whitespace().collect::<Vec<_>>()).unwrap()
    }

    fn found(text: &str) -> Vec<(What, String)> {
        list(&line(text)).unwrap().into_iter().map(|found| (found.what, found.name)).collect()
    }

    #[test]
    fn each_kind_is_found_and_can_be_replaced() {
        use What::*;
        for (text, what, name) in [
            ("-kernel /k", File, "/k"),
            ("-initrd /i", File, "/i"),
            ("-dtb /d", File, "/d"),
            ("-bios /b", Firmware, "/b"),
            ("-pflash /p", Disk, "/p"),
            ("-sd /s", Disk, "/s"),
            ("-mtdblock /m", Disk, "/m"),
            ("-L /l", Directory, "/l"),
            ("-D /log", Output, "/log"),
            ("-pidfile /pid", Output, "/pid"),
            ("disk.img", Disk, "disk.img"),
            ("-cdrom /c.iso", Disk, "/c.iso"),
            ("-drive file=/a,,b.img,format=raw", Disk, "/a,b.img"),
            ("-drive if=none,file.driver=file,file.filename=/a", Disk, "/a"),
            ("-blockdev driver=qcow2,node-name=a,file.driver=file,file.filename=/a", Disk, "/a"),
            (
                r#"-blockdev {"driver":"raw","file":{"driver":"host_device","filename":"/dev/vg/a"}}"#,
                Disk,
                "/dev/vg/a",
            ),
            ("-blockdev driver=nbd,node-name=a,server.type=unix,server.path=/n", Connects, "/n"),
            ("-chardev socket,id=a,path=/s,server=on,wait=off", Listens, "/s"),
            ("-chardev socket,id=a,path=/s,server,nowait", Listens, "/s"),
            ("-chardev socket,id=a,path=/s", Connects, "/s"),
            ("-chardev socket,id=a,fd=24,server=on", Descriptor, "24"),
            ("-chardev file,id=a,path=/f", Output, "/f"),
            ("-chardev null,id=a,logfile=/f", Output, "/f"),
            ("-chardev pipe,id=a,path=/f", Device, "/f"),
            ("-chardev serial,id=a,path=/dev/ttyS0", Device, "/dev/ttyS0"),
            ("-serial unix:/s,server=on,wait=off", Listens, "/s"),
            ("-monitor unix:/s,server,nowait", Listens, "/s"),
            ("-qmp unix:/s", Connects, "/s"),
            ("-serial mon:unix:/s,server=on", Listens, "/s"),
            ("-serial file:/f", Output, "/f"),
            ("-serial /dev/ttyS1", Device, "/dev/ttyS1"),
            ("-netdev tap,id=n,ifname=tap0,script=no", Tap, "tap0"),
            ("-netdev tap,id=n,ifname=tap0", TapMade, "tap0"),
            ("-nic tap,ifname=tap0,script=no", Tap, "tap0"),
            ("-netdev tap,id=n,script=/up", Program, "/up"),
            (r#"-netdev {"type":"tap","id":"n","ifname":"tap0","script":"no"}"#, Tap, "tap0"),
            ("-netdev tap,id=n,fd=33", Descriptor, "33"),
            ("-netdev bridge,id=n,br=virbr0", Bridge, "virbr0"),
            ("-netdev user,id=n,tftp=/t", Directory, "/t"),
            ("-netdev stream,id=n,server=on,addr.type=unix,addr.path=/s", Listens, "/s"),
            ("-vnc unix:/v,password=on", Listens, "/v"),
            ("-display vnc=unix:/v", Listens, "/v"),
            ("-spice unix=on,addr=/s,disable-ticketing=on", Listens, "/s"),
            ("-fsdev local,id=f,path=/f,security_model=none", Directory, "/f"),
            ("-object secret,id=s,file=/s", File, "/s"),
            (r#"-object {"qom-type":"secret","id":"s","file":"/s"}"#, File, "/s"),
            ("-object rng-random,id=r,filename=/dev/urandom", Device, "/dev/urandom"),
            ("-object tls-creds-x509,id=t,dir=/t", Directory, "/t"),
            ("-device virtio-net-pci,romfile=/r", Firmware, "/r"),
            ("-fw_cfg name=opt/x,file=/f", File, "/f"),
            ("-smbios type=11,path=/f", File, "/f"),
            ("-plugin /p.so,x=1", File, "/p.so"),
            ("-machine q35,kernel=/k", File, "/k"),
            ("-set drive.a.file=/x", Disk, "/x"),
            ("-display egl-headless,rendernode=/dev/dri/renderD128", Device, "/dev/dri/renderD128"),
            ("-option-rom /r,bootindex=1", Firmware, "/r"),
        ] {
            assert_eq!(found(text), [(what, name.to_owned())], "{text}");
            let mut other = line(text);
            visit(&mut other, &mut |_, _, _| Some("/new,x".to_owned())).unwrap();
            let now: Vec<_> = list(&other).unwrap().into_iter().map(|found| found.name).collect();
            if !matches!(text.split(' ').next(), Some("-serial" | "-monitor" | "-qmp")) {
                assert_eq!(now, ["/new,x"], "{other:?}");
            }
        }
    }

    #[test]
    fn several_in_one_option() {
        use What::*;
        let names =
            |text| found(text).into_iter().map(|(what, name)| format!("{what:?} {name}")).collect::<Vec<_>>();
        assert_eq!(
            names("-netdev tap,id=n,ifname=t,script=/up,downscript=/down,vhost=on"),
            ["Device /dev/vhost-net", "TapMade t", "Program /up", "Program /down"]
        );
        assert_eq!(names("-netdev bridge,id=n"), ["Bridge br0"]);
        assert_eq!(names("-acpitable file=/a:/b"), ["File /a", "File /b"]);
        assert_eq!(names("-accel kvm -enable-kvm -M pc,accel=kvm -accel tcg"), vec!["Device /dev/kvm"; 3]);
        assert_eq!(
            found("-display gtk,gl=on -curses -add-fd fd=3,set=1")
                .iter()
                .map(|(what, _)| *what)
                .collect::<Vec<_>>(),
            [Screen, Screen, Descriptor]
        );
        assert_eq!(
            names("-drive file=blkdebug:/rules:/img -drive file=fat:rw:/dir"),
            ["File /rules", "Disk /img", "Directory /dir"]
        );
        assert_eq!(names("blkdebug::blkverify:/a:/b"), ["File /a", "Disk /b"]);
        let stranger = found(&format!("{}/img", "blkdebug::".repeat(100_000)));
        assert!(stranger.len() == 1 && stranger[0].1.starts_with("blkdebug::"), "no file is called so");
    }

    #[test]
    fn what_only_looks_like_a_path() {
        for text in [
            "-append root=/dev/vda",
            "-name /a",
            "-drive file=nbd://host/x",
            "-drive file=https://host/x.iso,media=cdrom",
            "-drive file=rbd:pool/image",
            "-blockdev driver=qcow2,node-name=a,file=protocol-node,backing=base",
            "-chardev socket,id=a,path=name,abstract=on",
            "-chardev stdio,id=a",
            "-serial mon:stdio -serial tcp::4444,server -serial chardev:a -serial none -monitor /x",
            "-netdev tap,id=n,script=no,downscript=no",
            "-machine pc,accel=kvm:tcg",
            "-device virtio-blk-pci,drive=/a",
            "-vnc :1",
            "-object iothread,id=/a",
        ] {
            assert_eq!(found(text), [], "{text}");
        }
    }

    #[test]
    fn relative_paths_become_absolute() {
        let mut made = line(
            "disk.img -kernel vmlinuz -bios bios.bin -bios ./own.bin -netdev tap,id=n,ifname=t,script=no -D /l",
        );
        absolute(&mut made, Path::new("/home/me")).unwrap();
        assert_eq!(
            made.print().join(" "),
            "/home/me/disk.img -kernel /home/me/vmlinuz -bios bios.bin -bios /home/me/./own.bin -netdev \
             tap,id=n,ifname=t,script=no -D /l"
        );
    }

    proptest! {
        #[test]
        fn looking_changes_nothing(args in proptest::collection::vec("(-drive|-chardev|-netdev|-object|-device|-serial|file=.*|socket,path=.*|tap,.*|.*)", 0..8)) {
            if let Ok(mut line) = CommandLine::parse(&args) {
                let before = line.print();
                let _ = visit(&mut line, &mut |_, _, _| None);
                prop_assert_eq!(line.print(), before);
                let _ = visit(&mut line, &mut |_, name, _| Some(format!("{name},x")));
            }
        }
    }
}
