//! The command line as it is typed.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use migrate::tls::Credentials;
use migrate::wire::opening::MAX_STREAMS;
use vmprocess::control::protocol::{Force, Trust};
use vmprocess::failure::Failure;
use vmprocess::size::Size;

use super::archive_args::{MergeArgs, RemoveArgs, VerifyArgs};
use super::values::{BaseArg, EngineArg, JsonArg, KeyArg, StreamPlace, parse_duration};
use crate::pki::PkiSettings;
use crate::qemu::output::Format;
use crate::vmm::Workload;

/// Gives each VM a private virtual memory: a fixed budget of RAM, an SSD behind it, and a way to move while it runs.
#[derive(Debug, Parser)]
#[command(
    name = "vmemd",
    version,
    propagate_version = true,
    subcommand_required = true,
    arg_required_else_help = true
)]
#[command(
    after_help = "Exit codes: 2 usage, 3 the host lacks something, 4 no such VM or name taken, 5 no room (RAM, store),
6 peer or link, 7 the VM failed, 8 hand-over in doubt, 9 the VM cannot move, 10 the VM has moved away, 12 it would have
stood still for longer than --max-downtime, 13 a checkpoint is damaged, 14 the checkpoint is whole but not what was to follow it,
130 interrupted, 1 anything else."
)]
pub(super) struct Cli {
    /// Directory of the VMs' control sockets [default: $VMEMD_RUN_DIR, /run/vmemd, or $XDG_RUNTIME_DIR/vmemd]
    #[arg(long, global = true, value_name = "DIR")]
    pub(super) run_dir: Option<PathBuf>,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Run a VM in the foreground: a QEMU of yours, or the built-in reference guest
    #[command(after_help = "Examples:
  vmemd run --name db --ram 512M -- qemu-system-x86_64 -m 1G -kernel vmlinuz -nographic
  vmemd run --name web --memory 2G --ram 1G --guest rewrite:working-set=1500M
The QEMU after -- is started as it stands there, with what vmemd needs added (`vmemd qemu-args` shows it), and takes this
process's place.
Ctrl-C stops the VM. After it has moved to another host the command ends with 10: not to be started again here.")]
    Run(RunArgs),
    /// Print the QEMU arguments and environment that `run` would use, for a QEMU that something else starts
    #[command(after_help = "Example:
  vmemd qemu-args --name db --ram 512M --format libvirt -- qemu-system-x86_64 -m 1G")]
    QemuArgs(QemuArgs),
    /// Run a VM from a checkpoint, at once: its memory comes as it is needed
    #[command(after_help = "Examples:
  vmemd restore /backup/web
  vmemd restore /backup/web 2026-11-29T23-20-00Z --as web2 --ram 1G
The checkpoint is not changed, and any number of VMs may begin from it. Until a VM has moved all of its memory to its own
store (`vmemd stat` shows what is still there), the checkpoint cannot be removed. Ctrl-C stops the VM.")]
    Restore(RestoreArgs),
    /// Let VMs arrive at this host
    #[command(after_help = "Example:
  vmemd serve --listen 127.0.0.1:7070 --ram 1G --store /var/lib/vmemd
  vmemd serve --listen 192.0.2.2:7070 --tls /etc/vmemd --ram 1G --store /var/lib/vmemd
The daemon may end or be restarted: running VMs go on.")]
    Serve(ServeArgs),
    /// Move a running VM to another host
    #[command(after_help = "Example:
  vmemd migrate web --to 127.0.0.1:7070 --json
  vmemd migrate web --to b.example:7070 --tls /etc/vmemd
Ctrl-C cancels, and the VM runs on where it was.")]
    Migrate(MigrateArgs),
    /// Save a running VM into an archive of checkpoints; or list, verify, merge and remove those of an archive
    #[command(after_help = "Examples:
  vmemd checkpoint web --to /backup/web --keep 6
  vmemd checkpoint list /backup/web
The VM runs on meanwhile, and stands still for the last pages alone. Ctrl-C cancels: the VM runs on, and nothing is left in the
archive. A VM that is named like one of the commands below is saved by `vmemd checkpoint --to DIR -- NAME`.")]
    Checkpoint(CheckpointArgs),
    /// Make certificates by which hosts know each other
    #[command(subcommand)]
    Pki(PkiCommand),
    /// List the VMs of this host
    #[command(after_help = "Example:\n  vmemd list --json")]
    List(JsonArg),
    /// Show what a VM's memory does
    #[command(after_help = "Example:\n  vmemd stat web --watch")]
    Stat(StatArgs),
    /// Change a running VM's RAM budget
    #[command(after_help = "Example:\n  vmemd set web --ram 1G")]
    Set(SetArgs),
    /// Stop a VM's vCPUs until `resume`
    #[command(after_help = "Example:\n  vmemd pause web")]
    Pause(NameArgs),
    /// Let a VM go on: one that was paused, whose store failed, or whose hand-over is in doubt
    #[command(after_help = "Example:\n  vmemd resume web")]
    Resume(NameArgs),
    /// Find out what became of a hand-over in doubt, and end the doubt
    #[command(after_help = "Examples:
  vmemd resolve web
  vmemd resolve web --force run-here
Asks the target, and does what it says. Exit code 8: it does not answer, and the VM stands still as before. Only then --force counts:
run-here if you know that the VM does not run at the target and never will (that host is off, or its VM has been killed), gone if
you know that it runs there. If run-here is wrong, the VM runs twice, and both write to its disks; if gone is wrong, it is lost.")]
    Resolve(ResolveArgs),
    /// End a VM
    #[command(after_help = "Example:\n  vmemd stop web")]
    Stop(NameArgs),
    /// Say what this host has and lacks, with the remedy
    #[command(after_help = "Example:\n  vmemd doctor --store /var/lib/vmemd")]
    Doctor(DoctorArgs),
    /// Measure, with `vmemd-bench`
    #[command(disable_help_flag = true, disable_version_flag = true)]
    #[command(after_help = "Examples:
  vmemd bench --help
  vmemd bench migrate --memory 4G --ram 2G --targets vmemd,swap,ram
  vmemd bench run benches/jobs/randrw8.fio --engine vmemd,swap,raw --repeat 5")]
    Bench {
        /// What to measure, and how
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<OsString>,
    },
    /// Receive a VM (started by the daemon)
    #[command(hide = true)]
    Receive { settings: String },
}

#[derive(Debug, Args)]
pub(super) struct NameArgs {
    /// The VM
    pub(super) name: String,
    #[command(flatten)]
    pub(super) json: JsonArg,
}

#[derive(Debug, Args)]
pub(super) struct ResolveArgs {
    /// The VM
    pub(super) name: String,
    /// What you know, if the target does not answer
    #[arg(long, value_enum, value_name = "WHAT")]
    pub(super) force: Option<ForceArg>,
    #[command(flatten)]
    pub(super) json: JsonArg,
}

/// What somebody knows of a VM whose hand-over is in doubt.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum ForceArg {
    /// It does not run at the target and never will: it goes on here
    RunHere,
    /// It runs at the target: it ends here
    Gone,
}

impl From<ForceArg> for Force {
    fn from(force: ForceArg) -> Force {
        match force {
            ForceArg::RunHere => Force::RunHere,
            ForceArg::Gone => Force::Gone,
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Its name: letters, digits, '.', '_' and '-'
    #[arg(long)]
    pub(super) name: String,
    /// Memory of the reference guest, a multiple of 2M (a QEMU has its -m)
    #[arg(long, value_name = "SIZE", required_unless_present = "qemu", conflicts_with = "qemu")]
    pub(super) memory: Option<Size>,
    /// What the reference guest does: fill, rewrite, random, zipf, read or idle, as in
    /// rewrite:working-set=1500M,rate=200M
    #[arg(long, value_name = "WORKLOAD", default_value = "rewrite", conflicts_with = "qemu")]
    pub(super) guest: Workload,
    /// Number of vCPUs of the reference guest, 1 to 8
    #[arg(long, default_value_t = 1, conflicts_with = "qemu")]
    pub(super) vcpus: u32,
    #[command(flatten)]
    pub(super) limits: LimitArgs,
    #[arg(long, hide = true, value_enum, default_value = "vmemd", conflicts_with = "qemu")]
    pub(super) engine: EngineArg,
    /// A QEMU and its arguments, as you would start it yourself
    #[arg(last = true, value_name = "QEMU")]
    pub(super) qemu: Vec<OsString>,
}

#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    /// The directory with the VM's checkpoints
    pub(super) dir: PathBuf,
    /// Which of them [default: the latest]
    pub(super) checkpoint: Option<String>,
    #[command(flatten)]
    pub(super) key: KeyArg,
    /// Another name for it: a second life is another VM
    #[arg(long = "as", value_name = "NAME")]
    pub(super) name: Option<String>,
    #[command(flatten)]
    pub(super) limits: LimitArgs,
    /// It stands still until `vmemd resume`
    #[arg(long)]
    pub(super) paused: bool,
    /// It runs when all of its memory is here: in RAM, or what does not fit there in its store
    #[arg(long)]
    pub(super) eager: bool,
    /// While it runs, move no more than this a second from the checkpoint to its store
    #[arg(long, value_name = "SIZE", conflicts_with = "keep_origin")]
    pub(super) rate: Option<Size>,
    /// Leave in the checkpoint what does not change: it is needed for as long as the VM runs
    #[arg(long, conflicts_with = "eager")]
    pub(super) keep_origin: bool,
    #[command(flatten)]
    pub(super) disks: DiskArgs,
    #[command(flatten)]
    pub(super) json: JsonArg,
    /// A QEMU and its arguments
    #[arg(last = true, value_name = "QEMU")]
    pub(super) qemu: Vec<OsString>,
}

/// The outside of a QEMU VM that begins from a checkpoint.
#[derive(Debug, Args)]
pub(super) struct DiskArgs {
    /// QEMU: its disks are copies of the VM's as they were at the checkpoint, made in this directory
    #[arg(long, value_name = "DIR", conflicts_with_all = ["disks_back", "disks_as_they_are"])]
    pub(super) disk_copies: Option<PathBuf>,
    /// QEMU: the VM's disks are put back to what they were at the checkpoint; what was written since is lost
    #[arg(long, conflicts_with = "disks_as_they_are")]
    pub(super) disks_back: bool,
    /// QEMU: the VM's disks as they are now, though its memory is of another moment
    #[arg(long)]
    pub(super) disks_as_they_are: bool,
    /// QEMU: it may have the addresses (tap, MAC, vsock) of the VM that it is a copy of, though that runs
    #[arg(long)]
    pub(super) same_addresses: bool,
    /// QEMU: names of this host for what the checkpoint names, as for `vmemd serve`
    #[arg(long, value_name = "FILE")]
    pub(super) qemu_rules: Option<PathBuf>,
}

/// What a VM may use.
#[derive(Debug, Args)]
pub(super) struct LimitArgs {
    /// RAM that it may use [default: all of its memory; of `restore`, what it had]
    #[arg(long, value_name = "SIZE")]
    pub(super) ram: Option<Size>,
    /// Where the pages go that have no RAM: a directory on an SSD, or a block device
    /// [default: /var/lib/vmemd, or ~/.local/share/vmemd]
    #[arg(long, value_name = "PATH")]
    pub(super) store: Option<PathBuf>,
    /// Start even if the store has less room than the VM could need: for a large VM that leaves most of its memory
    /// untouched. When the store is full the VM stands still (`stalled` in `vmemd stat`, with the reason) and loses
    /// nothing; make room there, then `vmemd resume`
    #[arg(long)]
    pub(super) store_overcommit: bool,
    /// Take a store that is in this host's RAM (tmpfs, zram), which is refused otherwise: for trials, where nothing
    /// need fit
    #[arg(long)]
    pub(super) store_in_ram: bool,
    /// Encrypt the store, with a key that only the VM's process knows (AES-256-XTS)
    #[arg(long)]
    pub(super) encrypt_store: bool,
    /// Take all RAM at the start
    #[arg(long)]
    pub(super) prealloc: bool,
    /// Do not lock the VM's RAM against the host's own swap
    #[arg(long)]
    pub(super) no_lock: bool,
}

#[derive(Debug, Args)]
pub(super) struct QemuArgs {
    /// Its name: letters, digits, '.', '_' and '-'
    #[arg(long)]
    pub(super) name: String,
    #[command(flatten)]
    pub(super) limits: LimitArgs,
    /// What is to be printed
    #[arg(long, value_enum, default_value = "shell")]
    pub(super) format: FormatArg,
    /// A QEMU and its arguments, as you would start it yourself
    #[arg(last = true, required = true, value_name = "QEMU")]
    pub(super) qemu: Vec<OsString>,
}

/// How `qemu-args` prints.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(super) enum FormatArg {
    /// A line for a POSIX shell
    Shell,
    /// For programs
    Json,
    /// Elements for a libvirt domain
    Libvirt,
}

impl From<FormatArg> for Format {
    fn from(format: FormatArg) -> Format {
        match format {
            FormatArg::Shell => Format::Shell,
            FormatArg::Json => Format::Json,
            FormatArg::Libvirt => Format::Libvirt,
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    /// Where to listen: ADDRESS:PORT (port 0: any, see stdout)
    #[arg(long, value_name = "ADDR")]
    pub(super) listen: String,
    /// Directory with this host's ca.crt, host.crt and host.key (`vmemd pki`): only hosts with a certificate of that CA
    /// may come, by TLS 1.3. Read again when they have changed
    #[arg(long, value_name = "DIR", conflicts_with = "plain")]
    pub(super) tls: Option<PathBuf>,
    /// Of those, only hosts with one of these names in their certificate [default: all]
    #[arg(long, value_name = "NAME", value_delimiter = ',', requires = "tls")]
    pub(super) allow_peer: Vec<String>,
    /// Listen without TLS where other hosts can connect: whoever does may send VMs, and read them on their way
    #[arg(long)]
    pub(super) plain: bool,
    /// RAM for all VMs that arrive
    #[arg(long, value_name = "SIZE")]
    pub(super) ram: Size,
    /// Directory on an SSD for the pages that have no RAM; made if missing
    #[arg(long, value_name = "DIR")]
    pub(super) store: PathBuf,
    /// Take a store that is in this host's RAM (tmpfs, zram), which is refused otherwise: for trials, where nothing
    /// need fit
    #[arg(long)]
    pub(super) store_in_ram: bool,
    /// What holds the memory of VMs that arrive: plain is ordinary memory, for comparisons
    #[arg(long, value_enum, default_value = "vmemd")]
    pub(super) engine: EngineArg,
    /// Do not lock the VMs' RAM against the host's own swap
    #[arg(long)]
    pub(super) no_lock: bool,
    /// Encrypt the stores of VMs that arrive, each with a key that only its process knows (AES-256-XTS)
    #[arg(long)]
    pub(super) encrypt_store: bool,
    /// One log file a VM in this directory, instead of the daemon's stderr
    #[arg(long, value_name = "DIR")]
    pub(super) log_dir: Option<PathBuf>,
    /// Let QEMU VMs come, with names in their command lines mapped by this TOML file (see docs/qemu.md; it may be
    /// empty). Whoever may send VMs here (--tls, --allow-peer) can then start programs
    #[arg(long, value_name = "FILE")]
    pub(super) qemu_rules: Option<PathBuf>,
    #[command(flatten)]
    pub(super) json: JsonArg,
}

#[derive(Debug, Args)]
pub(super) struct MigrateArgs {
    /// The VM
    pub(super) name: String,
    /// The target's daemon: HOST:PORT
    #[arg(long, value_name = "ADDR")]
    pub(super) to: String,
    #[command(flatten)]
    pub(super) trust: TrustArgs,
    /// RAM that it shall have there [default: what the daemon has left]
    #[arg(long, value_name = "SIZE")]
    pub(super) ram: Option<Size>,
    /// Stop the VM when what is left can be sent in this time
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = parse_duration)]
    pub(super) downtime_target: Duration,
    /// Do not stop the VM for longer than this: give up if it takes more, and run on here
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    pub(super) max_downtime: Option<Duration>,
    /// Number of data connections
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_STREAMS)))]
    pub(super) streams: u32,
    /// Stop the VM after this many rounds, whatever is left
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) max_rounds: u32,
    /// Never slow a guest down that writes faster than can be sent
    #[arg(long)]
    pub(super) no_throttle: bool,
    /// Measure how much of what the VM touches in its first second there is in RAM
    #[arg(long)]
    pub(super) check_placement: bool,
    #[command(flatten)]
    pub(super) json: JsonArg,
}

/// Either of the two: what is to be saved, or what is to be done with an archive.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub(super) struct CheckpointArgs {
    #[command(flatten)]
    pub(super) make: Option<MakeArgs>,
    #[command(subcommand)]
    pub(super) command: Option<ArchiveCommand>,
}

/// A checkpoint that is to be made.
#[derive(Debug, Args)]
pub(super) struct MakeArgs {
    /// The VM
    pub(super) name: String,
    /// Its archive: a directory for the checkpoints of this VM alone; made if missing
    #[arg(long, value_name = "DIR")]
    pub(super) to: PathBuf,
    /// The checkpoint whose pages need not be saved again: latest, none, or its name
    #[arg(long, value_name = "NAME", default_value = "none")]
    pub(super) base: BaseArg,
    /// Keep this many checkpoints, and remove older ones when the new one is there
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(super) keep: Option<u32>,
    /// With --keep: leave the snapshots of checkpoints that go in the disks' files
    #[arg(long, requires = "keep")]
    pub(super) leave_snapshots: bool,
    /// Stop the VM for the last pages when they can be written in this time
    #[arg(long, value_name = "TIME", default_value = "50ms", value_parser = parse_duration)]
    pub(super) downtime_target: Duration,
    /// Stop the VM for them after this many rounds, whatever is left
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub(super) max_rounds: u32,
    /// Never slow a guest down that writes faster than can be saved
    #[arg(long)]
    pub(super) no_throttle: bool,
    /// Write at most so much a second while the VM runs
    #[arg(long, value_name = "SIZE")]
    pub(super) rate: Option<Size>,
    /// End the VM when the checkpoint is durable: nothing that it does after the checkpoint is lost
    #[arg(long)]
    pub(super) stop: bool,
    /// Of a QEMU with disks, save memory and state alone
    #[arg(long)]
    pub(super) without_disks: bool,
    /// Encrypt it with the key in this file: 32 random bytes, or 64 hexadecimal digits, which nobody else may read
    #[arg(long, value_name = "KEYFILE", conflicts_with = "plain")]
    pub(super) encrypt_to: Option<PathBuf>,
    /// Of a VM whose store is encrypted, save it unencrypted
    #[arg(long)]
    pub(super) plain: bool,
    // Not a flattened `JsonArg`: clap would no longer see whether any of these is there.
    /// Print JSON
    #[arg(long)]
    pub(super) json: bool,
}

/// What is done with an archive alone, without any VM.
#[derive(Debug, Subcommand)]
pub(super) enum ArchiveCommand {
    /// List the checkpoints of an archive, the newest first
    #[command(after_help = "Example:\n  vmemd checkpoint list /backup/web")]
    List(ArchiveArgs),
    /// Show what a checkpoint is, and of what
    #[command(after_help = "Example:\n  vmemd checkpoint show /backup/web 2026-11-29T23-20-00Z")]
    Show(NamedArgs),
    /// Read everything that a checkpoint needs, or that an archive has, and compare it with its checksums
    #[command(after_help = "Examples:
  vmemd checkpoint verify /backup/web
  vmemd checkpoint verify /backup/web 2026-11-29T23-20-00Z
Exit code 13: something is not what was saved. The pages are named.")]
    Verify(VerifyArgs),
    /// Give a checkpoint the pages of its bases, so that it needs them no longer
    #[command(after_help = "Example:
  vmemd checkpoint merge /backup/web 2026-11-29T23-20-00Z
The bases stay; they can be removed afterwards, if nothing else needs them. VMs that were restored from either run on.")]
    Merge(MergeArgs),
    /// Remove a checkpoint that no other one and no restored VM needs
    #[command(after_help = "Example:\n  vmemd checkpoint remove /backup/web 2026-11-29T23-20-00Z
The snapshots of its disks go as well, through the QEMU that has them open or by qemu-img; one that cannot go is named.")]
    Remove(RemoveArgs),
    /// Write a checkpoint as one stream that stands alone: to a pipe, or into an object store
    #[command(after_help = "Examples:
  vmemd checkpoint export /backup/web - | ssh b.example vmemd checkpoint import - --to /backup/web
  vmemd checkpoint export /backup/web 2026-11-29T23-20-00Z s3://backups/web/monday
Object stores: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT and AWS_ALLOW_HTTP say where and as whom.
The content of a QEMU's disks is no part of it.")]
    Export(ExportArgs),
    /// Make a checkpoint of such a stream, in the archive of the same VM
    #[command(after_help = "Examples:
  vmemd checkpoint import - --to /backup/web < web.log
  vmemd checkpoint import s3://backups/web/monday --to /backup/web
All of it is compared with its checksums. A stream that is cut or damaged (exit code 13) leaves nothing in the archive.")]
    Import(ImportArgs),
}

#[derive(Debug, Args)]
pub(super) struct ArchiveArgs {
    /// The archive
    #[arg(value_name = "DIR")]
    pub(super) archive: PathBuf,
    #[command(flatten)]
    pub(super) json: JsonArg,
}

/// An archive, and maybe one of its checkpoints.
#[derive(Debug, Args)]
pub(super) struct NamedArgs {
    #[command(flatten)]
    pub(super) archive: ArchiveArgs,
    /// The checkpoint [default: the latest]
    #[arg(value_name = "NAME")]
    pub(super) checkpoint: Option<String>,
}

/// A checkpoint that is to leave its archive.
#[derive(Debug, Args)]
#[command(allow_missing_positional = true)]
pub(super) struct ExportArgs {
    /// The archive
    #[arg(value_name = "DIR")]
    pub(super) archive: PathBuf,
    /// The checkpoint [default: the latest]
    #[arg(value_name = "NAME")]
    pub(super) checkpoint: Option<String>,
    /// `-` for standard output, or s3://BUCKET/KEY
    #[arg(value_name = "TO")]
    pub(super) to: StreamPlace,
    #[command(flatten)]
    pub(super) key: KeyArg,
    #[command(flatten)]
    pub(super) json: JsonArg,
}

/// A checkpoint that is to come into an archive.
#[derive(Debug, Args)]
pub(super) struct ImportArgs {
    /// `-` for standard input, a file, or s3://BUCKET/KEY
    #[arg(value_name = "FROM")]
    pub(super) from: StreamPlace,
    /// The archive: a directory for the checkpoints of this VM alone; made if missing
    #[arg(long, value_name = "DIR")]
    pub(super) to: PathBuf,
    #[command(flatten)]
    pub(super) json: JsonArg,
}

/// How to be sure of a target.
#[derive(Debug, Args)]
pub(super) struct TrustArgs {
    /// Directory with this host's ca.crt, host.crt and host.key (`vmemd pki`): by TLS 1.3, to a target of the same CA
    #[arg(long, value_name = "DIR", conflicts_with = "plain")]
    tls: Option<PathBuf>,
    /// Name in the target's certificate [default: the host in --to]
    #[arg(long, value_name = "NAME", requires = "tls")]
    tls_name: Option<String>,
    /// To another host without TLS: unencrypted, and to whoever answers
    #[arg(long)]
    plain: bool,
}

impl TrustArgs {
    /// Reads the files.
    pub(super) fn read(self) -> Result<Trust, Failure> {
        let tls = self.tls.as_deref().map(Credentials::read).transpose()?;
        Ok(Trust { tls, tls_name: self.tls_name, plain: self.plain })
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum PkiCommand {
    /// Make a small CA, for a test set-up, and the certificates of its hosts
    #[command(after_help = "Example:
  vmemd pki init ca --host a.example,192.0.2.1 --host b.example,192.0.2.2
makes ca/a.example and ca/b.example, for `serve --tls` and `migrate --tls` on those hosts. Keep ca/ca.key off them.")]
    Init(PkiArgs),
    /// Make certificates of a CA that `init` has made: for more hosts, or new ones for those whose have expired
    #[command(after_help = "Example:
  vmemd pki issue ca --host c.example,192.0.2.3 --days 90")]
    Issue(PkiArgs),
}

#[derive(Debug, Args)]
pub(super) struct PkiArgs {
    /// Directory of the CA; nothing in it is overwritten
    dir: PathBuf,
    /// A host's names and addresses, by which others call it, with commas between them; the first names its directory
    #[arg(long = "host", value_name = "NAME[,NAME]", required = true)]
    hosts: Vec<String>,
    /// How long the hosts' certificates are valid
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36500))]
    days: u32,
}

impl From<PkiArgs> for PkiSettings {
    fn from(args: PkiArgs) -> PkiSettings {
        PkiSettings { dir: args.dir, hosts: args.hosts, days: args.days }
    }
}

#[derive(Debug, Args)]
pub(super) struct StatArgs {
    /// The VM
    pub(super) name: String,
    /// Show it again every second, with rates
    #[arg(long)]
    pub(super) watch: bool,
    #[command(flatten)]
    pub(super) json: JsonArg,
}

#[derive(Debug, Args)]
pub(super) struct SetArgs {
    /// The VM
    pub(super) name: String,
    /// Its new RAM budget
    #[arg(long, value_name = "SIZE")]
    pub(super) ram: Size,
    #[command(flatten)]
    pub(super) json: JsonArg,
}

#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// The store directory to look at [default: that of `vmemd run`]
    #[arg(long, value_name = "DIR")]
    pub(super) store: Option<PathBuf>,
    #[command(flatten)]
    pub(super) json: JsonArg,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_checkpoint_is_made_of_a_vm_or_its_archive_is_looked_at() {
        let parsed = |words: &str| match Cli::try_parse_from(words.split(' ')).unwrap().command {
            Command::Checkpoint(args) => args,
            other => panic!("{other:?}"),
        };
        let made =
            parsed("vmemd checkpoint web --to /b --base latest --keep 6 --rate 200M --json").make.unwrap();
        assert_eq!((made.name.as_str(), made.base, made.keep), ("web", BaseArg::Latest, Some(6)));
        assert!(made.json && made.rate == Some("200M".parse().unwrap()));
        assert_eq!(parsed("vmemd checkpoint --to /b -- list").make.unwrap().name, "list");
        assert!(matches!(parsed("vmemd checkpoint list /b").command, Some(ArchiveCommand::List(_))));
        assert!(Cli::try_parse_from(["vmemd", "checkpoint", "web"]).is_err());
    }

    #[test]
    fn every_command_shows_an_example() {
        for command in Cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
            let leaves: Vec<_> = command.get_subcommands().filter(|leaf| !leaf.is_hide_set()).collect();
            let leaves = if leaves.is_empty() { vec![command] } else { leaves };
            for leaf in leaves {
                let help = leaf.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.contains("Example"), "{}", leaf.get_name());
            }
        }
    }
}
