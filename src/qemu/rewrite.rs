//! A QEMU command line becomes one whose memory vmemd manages: guest RAM in files of ours, mapped shared, and a QMP
//! socket. All else stays as it is, in its order.
//!
//! Guest RAM is either one piece (`-m`), and gets a backend of ours; or it is in `memory-backend-ram` (or `-memfd`)
//! objects that the machine or its NUMA nodes name, and each becomes a file in its place, with its id and policy.

use std::os::fd::RawFd;
use std::path::{Path, PathBuf};

use swapd::Engine;
use vmprocess::failure::{Failure, FailureKind};
use vmprocess::size::Size;

use super::options::{CommandLine, Word, size};
use super::props::Set;
use super::refuse::refuse;
use super::waits;

/// The backend that we add where there is none.
pub const OUR_BACKEND: &str = "vmemd-ram0";
const OUR_QMP: &str = "vmemd-qmp";
/// Backends begin where a transparent huge page can.
const ALIGN: u64 = 2 << 20;
/// QEMU rounds `-m` up to this.
const MEMORY_STEP: u64 = 8192;
/// The memory that QEMU gives a machine without `-m`, if its kind is one of these.
const DEFAULT_MEMORY: u64 = 128 << 20;
const WITH_DEFAULT_MEMORY: &[&str] = &["pc", "q35", "isapc", "microvm"];
/// What fits into a socket's address with its final zero.
const MAX_SOCKET_PATH: usize = 107;

/// A piece of guest memory, as QEMU will map it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backend {
    pub id: String,
    /// As QEMU gives it to the guest.
    pub size: Size,
    /// QEMU touches all of it at the start.
    pub prealloc: bool,
    /// The NUMA node that it is.
    pub node: Option<u32>,
    /// The `-object` it is made of; None for ours.
    word: Option<usize>,
}

impl Backend {
    /// What QEMU maps of it: whole pages.
    pub fn mapped(&self) -> Option<u64> {
        self.size.bytes().checked_next_multiple_of(swapd::PAGE_SIZE as u64)
    }

    /// What the engine counts for it.
    fn managed(&self) -> Option<u64> {
        Engine::rounded(self.mapped()?)
    }
}

/// Whether QEMU starts a VM, or takes one that arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Start,
    Arrive,
}

/// Where QEMU's monitor for us is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Monitor<'a> {
    /// A socket that QEMU makes.
    Socket(&'a Path),
    /// An inherited, connected socket.
    Descriptor(RawFd),
}

/// The files and the monitor that the caller has made for QEMU.
#[derive(Clone, Debug)]
pub struct Settings<'a> {
    /// A file for each of [`LinePlan::backends`], in that order.
    pub files: &'a [PathBuf],
    pub monitor: Monitor<'a>,
    pub role: Role,
}

/// A command line that can work, and the memory that it needs.
#[derive(Clone, Debug)]
pub struct LinePlan {
    line: CommandLine,
    pub backends: Vec<Backend>,
}

/// The command line to start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewritten {
    /// Without the binary.
    pub args: Vec<String>,
    /// The same by words that only come behind the given ones, if it was planned so.
    pub added: Vec<String>,
    pub backends: Vec<Backend>,
    pub memory: Size,
    /// As given; see [`Machines::pin`](super::machine::Machines::pin).
    pub machine: Option<String>,
    /// To tell the user.
    pub notes: Vec<String>,
}

fn usage(text: impl Into<String>) -> Failure {
    Failure::new(FailureKind::Usage, text)
}

impl LinePlan {
    /// Refuses what cannot work, and finds the guest's memory.
    pub fn of(line: &CommandLine) -> Result<LinePlan, Failure> {
        refuse(line)?;
        let prealloc = line.has("mem-prealloc");
        let mut backends = named_backends(line, prealloc)?;
        if backends.is_empty() {
            backends.push(our_backend(line, prealloc)?);
        }
        if let Some(backend) = backends.iter().find(|backend| backend.size.bytes() == 0) {
            return Err(usage(format!("guest memory {} has no size: see size=", backend.id)));
        }
        managed(&backends)
            .ok_or_else(|| usage("its memory backends are larger together than any address: see size="))?;
        Ok(LinePlan { line: line.clone(), backends })
    }

    /// As [`of`](LinePlan::of), but changes nothing of what is there: for those who can only add arguments at the end.
    /// QEMU takes the last `-machine memory-backend=`, and leaves an earlier backend unused.
    pub fn appended(line: &CommandLine) -> Result<LinePlan, Failure> {
        let plan = LinePlan::of(line)?;
        if plan.backends.iter().any(|backend| backend.node.is_some()) {
            return Err(usage(
                "NUMA nodes with memory of their own cannot be changed by arguments at the end: give the VM one \
                 node, or start it with `vmemd run`",
            ));
        }
        let line = plan.line;
        let size = plan.backends[0].size;
        let prealloc = plan.backends[0].prealloc;
        let ours = Backend { id: OUR_BACKEND.to_owned(), size, prealloc, node: None, word: None };
        Ok(LinePlan { line, backends: vec![ours] })
    }

    /// The guest's memory.
    pub fn memory(&self) -> Size {
        Size(self.backends.iter().map(|backend| backend.size.bytes()).sum())
    }

    /// The same as the engine counts it: each backend rounded up to 2M.
    pub fn managed(&self) -> Size {
        Size(managed(&self.backends).expect("checked when it was planned"))
    }

    /// The command line for QEMU.
    pub fn rewrite(self, settings: &Settings<'_>) -> Result<Rewritten, Failure> {
        let monitor = monitor(settings.monitor)?;
        assert_eq!(settings.files.len(), self.backends.len(), "one file for each backend");
        let memory = self.memory();
        let LinePlan { mut line, backends } = self;
        let mut notes: Vec<String> = line
            .unknown()
            .iter()
            .map(|flag| format!("{flag} is no option of QEMU that vmemd knows; it is passed on"))
            .collect();

        match settings.role {
            Role::Start => notes.extend(waits::list(&line)?.iter().map(|option| {
                format!("`{option}`: QEMU waits for a client there before anything else happens; with wait=off it does not")
            })),
            Role::Arrive => waits::end(&mut line)?,
        }

        let mut added = Vec::new();
        for (backend, file) in backends.iter().zip(settings.files) {
            let path = text(file)?;
            match backend.word {
                Some(at) => into_file(&mut line.words[at], path, backend.prealloc)?,
                None => added.extend(own_object(backend, path)),
            }
        }
        added.push(Word::new("-chardev", Some(format!("socket,id={OUR_QMP},{monitor}"))));
        added.push(Word::new("-mon", Some(format!("chardev={OUR_QMP},mode=control"))));
        if settings.role == Role::Arrive {
            if line.has("loadvm") {
                notes.push("-loadvm is left out: the VM comes as it is at the source".to_owned());
            }
            line.words.retain(|word| word.name() != "loadvm");
            added.push(Word::new("-incoming", Some("defer".to_owned())));
            if !line.has("S") {
                added.push(Word::new("-S", None));
            }
        }

        let mut alone = added.clone();
        if backends.iter().any(|backend| backend.word.is_none()) {
            let machine = Word::new("-machine", Some(format!("memory-backend={OUR_BACKEND}")));
            alone.insert(1, machine.clone());
            match line.words.iter_mut().rev().find(|word| word.name() == "machine") {
                Some(word) => {
                    let mut props = word.props()?;
                    props.set("memory-backend", Set::Text(OUR_BACKEND));
                    word.value = Some(props.print());
                }
                None => added.insert(1, machine),
            }
        }
        // Each backend says for itself whether it is preallocated.
        line.words.retain(|word| word.name() != "mem-prealloc");
        let machine = line.machine("type")?;
        line.words.extend(added);
        let added = CommandLine { words: alone }.print();
        Ok(Rewritten { args: line.print(), added, backends, memory, machine, notes })
    }
}

fn managed(backends: &[Backend]) -> Option<u64> {
    backends.iter().try_fold(0u64, |sum, backend| sum.checked_add(backend.managed()?))
}

fn monitor(monitor: Monitor<'_>) -> Result<String, Failure> {
    match monitor {
        Monitor::Descriptor(fd) => Ok(format!("fd={fd}")),
        Monitor::Socket(path) => {
            let path = text(path)?;
            if path.len() > MAX_SOCKET_PATH {
                return Err(usage(format!(
                    "{path} is too long for a socket's path: choose a shorter --run-dir"
                )));
            }
            Ok(format!("path={},server=on,wait=off", path.replace(',', ",,")))
        }
    }
}

fn text(path: &Path) -> Result<&str, Failure> {
    path.to_str().ok_or_else(|| usage(format!("{} is not UTF-8: choose another directory", path.display())))
}

/// The backends that the machine or its NUMA nodes name.
fn named_backends(line: &CommandLine, prealloc: bool) -> Result<Vec<Backend>, Failure> {
    let mut uses: Vec<(String, Option<u32>)> = Vec::new();
    uses.extend(line.machine("memory-backend")?.map(|id| (id, None)));
    let mut next = 0;
    for word in line.all("numa") {
        let props = word.props()?;
        if props.first("type").as_deref() != Some("node") {
            continue;
        }
        let node = match props.get("nodeid") {
            Some(id) => {
                id.parse().map_err(|_| usage(format!("`{}`: nodeid is not a number", word.shown())))?
            }
            None => next,
        };
        next += 1;
        uses.extend(props.get("memdev").map(|id| (id, Some(node))));
    }
    let mut found = Vec::new();
    for (at, word) in line.words().iter().enumerate().filter(|(_, word)| word.name() == "object") {
        let props = word.props()?;
        let Some(id) = props.get("id") else { continue };
        let Some(place) = uses.iter().position(|(used, _)| *used == id) else { continue };
        let (_, node) = uses.swap_remove(place);
        let kind = props.object().unwrap_or_default();
        if !matches!(kind.as_str(), "memory-backend-ram" | "memory-backend-memfd" | "memory-backend-shm") {
            let text = format!("`{}`: guest memory is in a {kind:?}: use memory-backend-ram", word.shown());
            return Err(usage(text));
        }
        let bytes = props.get("size").and_then(|text| size(&text, 1)).ok_or_else(|| {
            usage(format!(
                "`{}` has no size that can be read: write size=SIZE, such as size=1G",
                word.shown()
            ))
        })?;
        let prealloc = prealloc || props.is_on("prealloc");
        found.push(Backend { id, size: Size(bytes), prealloc, node, word: Some(at) });
    }
    match uses.first() {
        Some((id, _)) => Err(usage(format!(
            "guest memory {id:?} is named by the machine, but there is no (other) -object of this id: add -object \
             memory-backend-ram,id={id},size=SIZE"
        ))),
        None => Ok(found),
    }
}

fn our_backend(line: &CommandLine, prealloc: bool) -> Result<Backend, Failure> {
    let mut said = None;
    for word in line.all("m") {
        said = word.props()?.first("size").map(|text| (word, text)).or(said);
    }
    let asked = match said {
        Some((word, text)) => size(&text, 1 << 20).ok_or_else(|| {
            usage(format!("`{}`: {text:?} is not a size: write one such as -m 1G", word.shown()))
        })?,
        None => match line.machine("memory.size")? {
            Some(text) => size(&text, 1).ok_or_else(|| {
                usage(format!("-machine memory.size={text}: not a size: write one such as -m 1G"))
            })?,
            None => 0,
        },
    };
    let bytes = if asked == 0 { default_memory(line)? } else { asked };
    let bytes = bytes
        .checked_next_multiple_of(MEMORY_STEP)
        .ok_or_else(|| usage("its memory is larger than any address: see -m"))?;
    Ok(Backend { id: OUR_BACKEND.to_owned(), size: Size(bytes), prealloc, node: None, word: None })
}

/// Without `-m`, or with `-m 0`.
fn default_memory(line: &CommandLine) -> Result<u64, Failure> {
    let machine = line.machine("type")?;
    let kind =
        |name: &str| name.split(['-', '+']).next().is_some_and(|kind| WITH_DEFAULT_MEMORY.contains(&kind));
    if machine.as_deref().is_none_or(kind) {
        return Ok(DEFAULT_MEMORY);
    }
    let machine = machine.unwrap_or_default();
    Err(usage(format!(
        "the VM's memory is not given, and what machine {machine:?} has without -m is not known: add -m SIZE, such as -m 1G"
    )))
}

/// Our `-object`, to go before the rest of what is added.
fn own_object(backend: &Backend, path: &str) -> [Word; 1] {
    let prealloc = if backend.prealloc { ",prealloc=on" } else { "" };
    let value = format!(
        "memory-backend-file,id={},size={},mem-path={},share=on,align={}{prealloc}",
        backend.id,
        backend.size,
        path.replace(',', ",,"),
        Size(ALIGN),
    );
    [Word::new("-object", Some(value))]
}

/// Makes a file of an anonymous backend, in its place.
fn into_file(word: &mut Word, path: &str, prealloc: bool) -> Result<(), Failure> {
    let mut props = word.props()?;
    props.set_first("qom-type", "memory-backend-file");
    // These are for memfds, and off, or we would not be here.
    for key in ["hugetlb", "hugetlbsize", "seal"] {
        props.remove(key);
    }
    props.set("mem-path", Set::Text(path));
    props.set("share", Set::On);
    props.set("align", Set::Bytes(ALIGN));
    if prealloc {
        props.set("prealloc", Set::On);
    }
    word.value = Some(props.print());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(line: &str) -> CommandLine {
        CommandLine::parse(&line.split_whitespace().collect::<Vec<_>>()).unwrap()
    }

    fn rewritten(plan: LinePlan, role: Role) -> Rewritten {
        let files: Vec<_> =
            (0..plan.backends.len()).map(|n| PathBuf::from(format!("/proc/self/fd/{}", n + 5))).collect();
        plan.rewrite(&Settings { files: &files, monitor: Monitor::Socket(Path::new("/run/vm.qmp")), role })
            .unwrap()
    }

    fn start(line: &str) -> Rewritten {
        rewritten(LinePlan::of(&parse(line)).unwrap(), Role::Start)
    }

    fn error(line: &str) -> String {
        LinePlan::of(&parse(line)).unwrap_err().text
    }

    const QMP: &str = "-chardev socket,id=vmemd-qmp,path=/run/vm.qmp,server=on,wait=off -mon chardev=vmemd-qmp,mode=control";
    const OBJECT: &str =
        "-object memory-backend-file,id=vmemd-ram0,size=1G,mem-path=/proc/self/fd/5,share=on,align=2M";

    #[test]
    fn plain_memory_gets_a_backend() {
        let made = start("-m 1G -nographic");
        let expected = format!("-m 1G -nographic {OBJECT} -machine memory-backend=vmemd-ram0 {QMP}");
        assert_eq!(made.args.join(" "), expected);
        assert_eq!(made.memory, Size(1 << 30));
        assert_eq!(made.machine, None);
        assert_eq!(made.notes, Vec::<String>::new());

        let made = start("-m 1024 -M q35 -M usb=off -S");
        assert_eq!(
            made.args.join(" "),
            format!("-m 1024 -M q35 -M usb=off,memory-backend=vmemd-ram0 -S {OBJECT} {QMP}")
        );
        assert_eq!(made.machine.as_deref(), Some("q35"));
    }

    #[test]
    fn memory_in_all_its_forms() {
        for (line, bytes) in [
            ("-m 1G", 1 << 30),
            ("-m 1024", 1 << 30),
            ("-m size=1G,slots=2,maxmem=4G", 1 << 30),
            ("-m 512 -m size=2G", 2 << 30),
            ("-m 512 -m slots=2,maxmem=4G", 512 << 20),
            ("-m size=1048576k", 1 << 30),
            ("-m 255", 255 << 20),
            ("-m 1.5G", 3 << 29),
            // QEMU rounds up to 8 KiB.
            ("-m 2042471k", 2042472 << 10),
            ("-m size=1000001b", 1007616),
            ("-m 1", 1 << 20),
            ("-S", 128 << 20),
            ("-m 0", 128 << 20),
            ("-m slots=2,maxmem=4G -M pc-q35-7.2", 128 << 20),
            ("-M q35,memory.size=255M", 255 << 20),
            ("-M virt-9.0,memory.size=1G -m 2G", 2 << 30),
        ] {
            assert_eq!(start(line).memory, Size(bytes), "{line}");
        }
        for (line, says) in [
            ("-M sabrelite", "add -m SIZE, such as -m 1G"),
            // Of another size in each architecture.
            ("-M virt-9.0", "add -m SIZE"),
            ("-M virtex-ml507 -m 0", "add -m SIZE"),
            ("-m 1.5", "\"1.5\" is not a size"),
            ("-m lots", "\"lots\" is not a size"),
            ("-m 0xffffffffffffffffb", "is not a size"),
            ("-m 18446744073709551615b", "larger than any address"),
            ("-M q35,memory.size=lots", "write one such as -m 1G"),
        ] {
            assert!(error(line).contains(says), "{line}: {}", error(line));
        }
    }

    #[test]
    fn preallocation_is_each_backends_own() {
        let made = start("-m 1G -mem-prealloc");
        assert!(
            made.args.contains(&format!("{},prealloc=on", OBJECT.split_once(' ').unwrap().1)),
            "{made:?}"
        );
        assert!(!made.args.iter().any(|arg| arg == "-mem-prealloc"));
    }

    #[test]
    fn numa_backends_become_files_in_their_place() {
        let made = start(
            "-object memory-backend-ram,id=a,size=512M,host-nodes=0,policy=bind,prealloc=on,share=off -m 1G \
             -numa node,nodeid=1,memdev=b -numa node,nodeid=0,memdev=a,cpus=0 \
             -object {\"qom-type\":\"memory-backend-memfd\",\"id\":\"b\",\"size\":536870912,\"hugetlb\":false}",
        );
        assert_eq!(
            made.args.join(" "),
            format!(
                "-object memory-backend-file,id=a,size=512M,host-nodes=0,policy=bind,prealloc=on,share=on,\
                 mem-path=/proc/self/fd/5,align=2M -m 1G -numa node,nodeid=1,memdev=b -numa \
                 node,nodeid=0,memdev=a,cpus=0 -object {{\"align\":2097152,\"id\":\"b\",\"mem-path\":\
                 \"/proc/self/fd/6\",\"qom-type\":\"memory-backend-file\",\"share\":true,\"size\":536870912}} {QMP}"
            )
        );
        let found: Vec<_> =
            made.backends.iter().map(|b| (b.id.as_str(), b.size, b.prealloc, b.node)).collect();
        assert_eq!(found, [("a", Size(512 << 20), true, Some(0)), ("b", Size(512 << 20), false, Some(1))]);
        assert_eq!(made.memory, Size(1 << 30));
    }

    #[test]
    fn a_backend_that_the_machine_names_becomes_a_file() {
        let made =
            start("-machine pc,memory-backend=pc.ram -object memory-backend-ram,id=pc.ram,size=1G -m 1G");
        assert!(
            made.args[3].starts_with("memory-backend-file,id=pc.ram,size=1G,mem-path=/proc/self/fd/5"),
            "{made:?}"
        );
        assert_eq!(made.args[1], "pc,memory-backend=pc.ram");
        // What is no guest memory is left alone.
        let made = start("-m 1G -object memory-backend-ram,id=other,size=1G");
        assert_eq!(made.args[3], "memory-backend-ram,id=other,size=1G");
        assert_eq!(made.backends.len(), 1);
    }

    #[test]
    fn backends_that_cannot_be() {
        for (line, says) in [
            ("-m 1G -numa node,memdev=a", "there is no (other) -object of this id: add -object"),
            ("-m 1G -machine memory-backend=a", "there is no (other) -object"),
            ("-object memory-backend-ram,id=a -numa node,memdev=a", "no size that can be read"),
            ("-object memory-backend-ram,id=a,size=0 -numa node,memdev=a", "guest memory a has no size"),
            (
                "-object iothread,id=a,size=2M -numa node,memdev=a",
                "in a \"iothread\": use memory-backend-ram",
            ),
            ("-object memory-backend-ram,id=a,size=2M -numa node,memdev=a -numa node,memdev=a", "no (other)"),
            (
                "-object memory-backend-ram,id=a,size=2M -numa node,memdev=a,nodeid=x",
                "nodeid is not a number",
            ),
        ] {
            assert!(error(line).contains(says), "{line}: {}", error(line));
        }
    }

    #[test]
    fn a_vm_that_arrives_waits_for_its_state() {
        let made = rewritten(LinePlan::of(&parse("-m 1G -loadvm x")).unwrap(), Role::Arrive);
        assert!(made.args.join(" ").ends_with("mode=control -incoming defer -S"), "{made:?}");
        assert!(!made.args.contains(&"-loadvm".to_owned()));
        assert_eq!(made.notes.len(), 1);
        let made = rewritten(LinePlan::of(&parse("-S -m 1G")).unwrap(), Role::Arrive);
        assert!(made.args.join(" ").ends_with("mode=control -incoming defer"), "{made:?}");
    }

    #[test]
    fn arguments_at_the_end_alone() {
        let line = "-machine pc,memory-backend=pc.ram -object memory-backend-ram,id=pc.ram,size=1G -m 1G";
        let made = rewritten(LinePlan::appended(&parse(line)).unwrap(), Role::Start);
        assert_eq!(made.added.join(" "), format!("{OBJECT} -machine memory-backend=vmemd-ram0 {QMP}"));
        let numa = "-m 2M -object memory-backend-ram,id=a,size=2M -numa node,memdev=a";
        assert!(LinePlan::appended(&parse(numa)).unwrap_err().text.contains("start it with `vmemd run`"));
    }

    #[test]
    fn paths_are_escaped_and_bounded() {
        let plan = LinePlan::of(&parse("-m 1G -new x")).unwrap();
        let files = [PathBuf::from("/a,b")];
        let made = plan
            .clone()
            .rewrite(&Settings {
                files: &files,
                monitor: Monitor::Socket(Path::new("/c,d")),
                role: Role::Start,
            })
            .unwrap();
        assert!(made.args.iter().any(|arg| arg.contains("mem-path=/a,,b,share")));
        assert!(made.args.iter().any(|arg| arg.contains("path=/c,,d,server")));
        assert_eq!(made.notes, ["-new is no option of QEMU that vmemd knows; it is passed on"]);
        let long = PathBuf::from(format!("/{}", "x".repeat(107)));
        let error = plan
            .rewrite(&Settings { files: &files, monitor: Monitor::Socket(&long), role: Role::Start })
            .unwrap_err();
        assert!(error.text.contains("too long for a socket's path"), "{error}");
    }

    proptest! {
        #[test]
        fn the_rest_is_kept_in_its_order(rest in proptest::collection::vec("(-S|-usb|-device [a-z]{1,5},a=,,b|-name -x|disk)", 0..8)) {
            let rest: Vec<&str> = rest.iter().flat_map(|part| part.split(' ')).collect();
            let line = [&["-m", "1G"], rest.as_slice()].concat();
            let made = rewritten(LinePlan::of(&CommandLine::parse(&line).unwrap()).unwrap(), Role::Start);
            prop_assert_eq!(&made.args[..line.len()], &line[..]);
            // What was made is not taken for another VM's command line.
            let again = LinePlan::of(&CommandLine::parse(&made.args).unwrap());
            prop_assert!(again.is_err());
        }

        #[test]
        fn no_command_line_is_too_strange(args in proptest::collection::vec("(-m|1G|-object|-numa|-machine|memory-backend-ram,id=a,size=2M|node,memdev=a|.*)", 0..10)) {
            if let Ok(plan) = CommandLine::parse(&args).and_then(|line| LinePlan::of(&line)) {
                rewritten(plan, Role::Arrive);
            }
        }
    }
}
