//! Command lines as people and programs write them, and what becomes of them.

use std::path::{Path, PathBuf};

use super::options::CommandLine;
use super::resources::what::What;
use super::resources::{absolute, list};
use super::rewrite::{LinePlan, Monitor, Rewritten, Role, Settings};

const QMP: &str = "-chardev socket,id=vmemd-qmp,path=/run/vmemd/vm.qmp,server=on,wait=off -mon chardev=vmemd-qmp,mode=control";

fn ours(size: &str) -> String {
    format!(
        "-object memory-backend-file,id=vmemd-ram0,size={size},mem-path=/proc/self/fd/10,share=on,align=2M"
    )
}

fn parse(line: &str) -> CommandLine {
    CommandLine::parse(&line.split_whitespace().collect::<Vec<_>>()).unwrap()
}

fn rewrite(line: &str, role: Role) -> Rewritten {
    let plan = LinePlan::of(&parse(line)).unwrap();
    let files: Vec<_> =
        (0..plan.backends.len()).map(|n| PathBuf::from(format!("/proc/self/fd/{}", 10 + n))).collect();
    plan.rewrite(&Settings { files: &files, monitor: Monitor::Socket(Path::new("/run/vmemd/vm.qmp")), role })
        .unwrap()
}

/// The line with these parts replaced, and these words at its end.
fn golden(line: &str, replaced: &[(&str, &str)], end: &str) {
    let mut expected = line.split_whitespace().collect::<Vec<_>>().join(" ");
    for (from, to) in replaced {
        assert_eq!(expected.matches(from).count(), 1, "{from}");
        expected = expected.replace(from, to);
    }
    let made = rewrite(line, Role::Start);
    assert_eq!(made.args.join(" "), format!("{expected} {end}"));
    assert_eq!(made.notes, Vec::<String>::new());
    // At the target it is the same, but for the end.
    let there = rewrite(line, Role::Arrive).args;
    assert_eq!(there[..made.args.len()], made.args);
    let waits = there[made.args.len()..].join(" ");
    assert!(waits == "-incoming defer -S" || waits == "-incoming defer", "{waits}");
}

fn outside(line: &str) -> Vec<(What, String)> {
    list(&parse(line)).unwrap().into_iter().map(|found| (found.what, found.name)).collect()
}

fn all(names: &[(What, &str)]) -> Vec<(What, String)> {
    names.iter().map(|(what, name)| (*what, (*name).to_owned())).collect()
}

#[test]
fn plain() {
    let line = "-m 1G -smp 2 -kernel vmlinuz -initrd initrd.gz -append console=ttyS0 -nographic -no-reboot";
    golden(line, &[], &format!("{} -machine memory-backend=vmemd-ram0 {QMP}", ours("1G")));
    assert_eq!(outside(line), all(&[(What::File, "vmlinuz"), (What::File, "initrd.gz")]));
}

#[test]
fn a_desktop() {
    let line = "-enable-kvm -cpu host -m 8192 -M q35 -drive file=win.qcow2,if=virtio,cache=none,aio=native -cdrom v.iso \
                -nic user,model=virtio-net-pci,hostfwd=tcp::3389-:3389 -vga qxl -spice port=5900,disable-ticketing=on \
                -device virtio-serial -usb -device usb-tablet -rtc base=localtime";
    golden(line, &[("-M q35", "-M q35,memory-backend=vmemd-ram0")], &format!("{} {QMP}", ours("8G")));
    assert_eq!(
        outside(line),
        all(&[(What::Device, "/dev/kvm"), (What::Disk, "win.qcow2"), (What::Disk, "v.iso")])
    );
}

const LIBVIRT: &str = r#"-name guest=web,debug-threads=on -S
    -object {"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/qemu/domain-1-web/master-key.aes"}
    -blockdev {"driver":"file","filename":"/usr/share/OVMF/OVMF_CODE_4M.fd","node-name":"libvirt-pflash0-storage","auto-read-only":true}
    -blockdev {"node-name":"libvirt-pflash0-format","read-only":true,"driver":"raw","file":"libvirt-pflash0-storage"}
    -machine pc-q35-7.2,usb=off,vmport=off,dump-guest-core=off,memory-backend=pc.ram,pflash0=libvirt-pflash0-format
    -accel kvm -cpu host,migratable=on -m 4096
    -object {"qom-type":"memory-backend-ram","id":"pc.ram","size":4294967296}
    -overcommit mem-lock=off -smp 4,sockets=4,cores=1,threads=1 -uuid 1e1ff2a6-c04d-4a2e-b7f4-8e5f1d6f0f35 -no-user-config
    -nodefaults -chardev socket,id=charmonitor,path=/var/lib/libvirt/qemu/domain-1-web/monitor.sock,server=on,wait=off
    -mon chardev=charmonitor,id=monitor,mode=control -rtc base=utc -no-shutdown -boot strict=on
    -device {"driver":"pcie-root-port","port":16,"chassis":1,"id":"pci.1","bus":"pcie.0","multifunction":true,"addr":"0x2"}
    -blockdev {"driver":"file","filename":"/var/lib/libvirt/images/web.qcow2","node-name":"libvirt-1-storage","cache":{"direct":true,"no-flush":false}}
    -blockdev {"node-name":"libvirt-1-format","read-only":false,"driver":"qcow2","file":"libvirt-1-storage","backing":null}
    -device {"driver":"virtio-blk-pci","bus":"pci.1","drive":"libvirt-1-format","id":"virtio-disk0","bootindex":1}
    -netdev {"type":"tap","fd":"24","vhost":true,"vhostfd":"26","id":"hostnet0"}
    -device {"driver":"virtio-net-pci","netdev":"hostnet0","id":"net0","mac":"52:54:00:aa:bb:cc","bus":"pci.1"}
    -chardev pty,id=charserial0 -device {"driver":"isa-serial","chardev":"charserial0","id":"serial0","index":0}
    -audiodev {"id":"audio1","driver":"none"} -object {"qom-type":"rng-random","id":"objrng0","filename":"/dev/urandom"}
    -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny -msg timestamp=on"#;

#[test]
fn libvirts() {
    golden(
        LIBVIRT,
        &[(
            r#"{"qom-type":"memory-backend-ram","id":"pc.ram","size":4294967296}"#,
            r#"{"align":2097152,"id":"pc.ram","mem-path":"/proc/self/fd/10","qom-type":"memory-backend-file","share":true,"size":4294967296}"#,
        )],
        QMP,
    );
    assert_eq!(
        outside(LIBVIRT),
        all(&[
            (What::File, "/var/lib/libvirt/qemu/domain-1-web/master-key.aes"),
            (What::Disk, "/usr/share/OVMF/OVMF_CODE_4M.fd"),
            (What::Device, "/dev/kvm"),
            (What::Listens, "/var/lib/libvirt/qemu/domain-1-web/monitor.sock"),
            (What::Disk, "/var/lib/libvirt/images/web.qcow2"),
            (What::Descriptor, "24"),
            (What::Descriptor, "26"),
            (What::Device, "/dev/urandom"),
        ])
    );
    // What can only be added to libvirt's own line does the same.
    let plan = LinePlan::appended(&parse(LIBVIRT)).unwrap();
    let files = [PathBuf::from("/proc/self/fd/10")];
    let settings = Settings {
        files: &files,
        monitor: Monitor::Socket(Path::new("/run/vmemd/vm.qmp")),
        role: Role::Start,
    };
    let added = plan.rewrite(&settings).unwrap().added.join(" ");
    assert_eq!(added, format!("{} -machine memory-backend=vmemd-ram0 {QMP}", ours("4G")));
}

#[test]
fn libvirts_with_two_numa_nodes() {
    golden(
        r#"-machine pc-i440fx-7.2,usb=off -accel tcg -m size=2097152k
        -object {"qom-type":"memory-backend-ram","id":"ram-node0","size":1073741824,"host-nodes":[0],"policy":"bind"}
        -numa node,nodeid=0,cpus=0,memdev=ram-node0
        -object {"qom-type":"memory-backend-memfd","id":"ram-node1","share":true,"size":1073741824}
        -numa node,nodeid=1,cpus=1,memdev=ram-node1"#,
        &[
            (
                r#"{"qom-type":"memory-backend-ram","id":"ram-node0","size":1073741824,"host-nodes":[0],"policy":"bind"}"#,
                r#"{"align":2097152,"host-nodes":[0],"id":"ram-node0","mem-path":"/proc/self/fd/10","policy":"bind","qom-type":"memory-backend-file","share":true,"size":1073741824}"#,
            ),
            (
                r#"{"qom-type":"memory-backend-memfd","id":"ram-node1","share":true,"size":1073741824}"#,
                r#"{"align":2097152,"id":"ram-node1","mem-path":"/proc/self/fd/11","qom-type":"memory-backend-file","share":true,"size":1073741824}"#,
            ),
        ],
        QMP,
    );
}

#[test]
fn numa_by_hand() {
    golden(
        "-m 2G -smp 2 -object memory-backend-ram,id=m0,size=1G,prealloc=on -object memory-backend-ram,size=1G,id=m1 \
         -numa node,memdev=m0,cpus=0 -numa node,memdev=m1,cpus=1 -numa dist,src=0,dst=1,val=20 disk.img",
        &[
            (
                "memory-backend-ram,id=m0,size=1G,prealloc=on",
                "memory-backend-file,id=m0,size=1G,prealloc=on,mem-path=/proc/self/fd/10,share=on,align=2M",
            ),
            (
                "memory-backend-ram,size=1G,id=m1",
                "memory-backend-file,size=1G,id=m1,mem-path=/proc/self/fd/11,share=on,align=2M",
            ),
        ],
        QMP,
    );
}

#[test]
fn q35_with_firmware_in_flash() {
    let line = "-machine q35,smm=on,accel=kvm -global driver=cfi.pflash01,property=secure,value=on -m size=4G \
                -drive if=pflash,format=raw,unit=0,readonly=on,file=/usr/share/OVMF/OVMF_CODE.fd \
                -drive if=pflash,format=raw,unit=1,file=/vm/vars.fd -blockdev \
                driver=qcow2,node-name=d0,file.driver=file,file.filename=/vm/d.qcow2,file.aio=io_uring -device \
                virtio-blk-pci,drive=d0 -qmp unix:/vm/qmp,server=on,wait=off -serial file:/vm/console.log";
    golden(
        line,
        &[("smm=on,accel=kvm", "smm=on,accel=kvm,memory-backend=vmemd-ram0")],
        &format!("{} {QMP}", ours("4G")),
    );
    assert_eq!(
        outside(line),
        all(&[
            (What::Device, "/dev/kvm"),
            (What::Disk, "/usr/share/OVMF/OVMF_CODE.fd"),
            (What::Disk, "/vm/vars.fd"),
            (What::Disk, "/vm/d.qcow2"),
            (What::Listens, "/vm/qmp"),
            (What::Output, "/vm/console.log"),
        ])
    );
}

#[test]
fn in_the_manner_of_proxmox() {
    let line = "-id 100 -name db,debug-threads=on -no-shutdown -chardev \
                socket,id=qmp,path=/var/run/qemu-server/100.qmp,server=on,wait=off -mon chardev=qmp,mode=control \
                -pidfile /var/run/qemu-server/100.pid -smbios type=1,uuid=4f -smp 2,sockets=1,cores=2,maxcpus=2 \
                -nodefaults -boot menu=on,strict=on,reboot-timeout=1000 -vnc \
                unix:/var/run/qemu-server/100.vnc,password=on -cpu kvm64,enforce,+kvm_pv_eoi -m 2048 -object \
                iothread,id=iothread-virtioscsi0 -device pci-bridge,id=pci.1,chassis_nr=1,bus=pci.0,addr=0x1e -device \
                virtio-balloon-pci,id=balloon0,bus=pci.0,addr=0x3,free-page-reporting=on -drive \
                file=/dev/pve/vm-100-disk-0,if=none,id=drive-scsi0,format=raw,cache=none,aio=io_uring,detect-zeroes=on \
                -device virtio-scsi-pci,id=virtioscsi0,bus=pci.3,addr=0x1,iothread=iothread-virtioscsi0 -device \
                scsi-hd,bus=virtioscsi0.0,drive=drive-scsi0,id=scsi0 -netdev \
                type=tap,id=net0,ifname=tap100i0,script=/usr/libexec/qemu-server/pve-bridge,downscript=/usr/libexec/qemu-server/pve-bridgedown,vhost=on \
                -device virtio-net-pci,mac=BC:24:11:00:00:01,netdev=net0,bus=pci.0,addr=0x12,id=net0 -machine type=pc+pve0";
    let made = rewrite(line, Role::Start);
    let given: Vec<_> = line.split_whitespace().collect();
    assert_eq!(made.args[..given.len() - 1], given[..given.len() - 1]);
    let end = format!("type=pc+pve0,memory-backend=vmemd-ram0 {} {QMP}", ours("2G"));
    assert_eq!(made.args[given.len() - 1..].join(" "), end);
    // Proxmox's own option takes a value; it is told that this was guessed.
    assert_eq!(made.notes, ["-id is no option of QEMU that vmemd knows; it is passed on"]);
    assert_eq!(
        outside(line),
        all(&[
            (What::Listens, "/var/run/qemu-server/100.qmp"),
            (What::Output, "/var/run/qemu-server/100.pid"),
            (What::Listens, "/var/run/qemu-server/100.vnc"),
            (What::Disk, "/dev/pve/vm-100-disk-0"),
            (What::Device, "/dev/vhost-net"),
            (What::TapMade, "tap100i0"),
            (What::Program, "/usr/libexec/qemu-server/pve-bridge"),
            (What::Program, "/usr/libexec/qemu-server/pve-bridgedown"),
        ])
    );
}

#[test]
fn a_microvm() {
    let line = "--M microvm,x-option-roms=off,pit=off,rtc=off --enable-kvm --cpu host --m 256m --nodefaults \
                --no-user-config --nographic --serial stdio --kernel /boot/vmlinuz --append root=/dev/vda --drive \
                id=d,file=/vm/root.img,format=raw,if=none --device virtio-blk-device,drive=d --netdev \
                tap,id=t,ifname=tap0,script=no,downscript=no --device virtio-net-device,netdev=t";
    golden(line, &[("rtc=off", "rtc=off,memory-backend=vmemd-ram0")], &format!("{} {QMP}", ours("256M")));
    assert_eq!(
        outside(line),
        all(&[
            (What::Device, "/dev/kvm"),
            (What::File, "/boot/vmlinuz"),
            (What::Disk, "/vm/root.img"),
            (What::Tap, "tap0"),
        ])
    );
}

#[test]
fn sizes_that_are_no_multiple_of_a_huge_page() {
    for (line, size) in [
        ("-m 255 -nographic", "255M"),
        ("-m 2042471k -nographic", "2042472K"),
        ("-m 1.3G -nographic", "1363152K"),
        ("-nographic", "128M"),
    ] {
        golden(line, &[], &format!("{} -machine memory-backend=vmemd-ram0 {QMP}", ours(size)));
    }
    let line = "-m 255 -object memory-backend-ram,id=a,size=101M -object memory-backend-ram,id=b,size=154M -numa node,memdev=a \
                -numa node,memdev=b";
    golden(
        line,
        &[
            (
                "memory-backend-ram,id=a,size=101M",
                "memory-backend-file,id=a,size=101M,mem-path=/proc/self/fd/10,share=on,align=2M",
            ),
            (
                "memory-backend-ram,id=b,size=154M",
                "memory-backend-file,id=b,size=154M,mem-path=/proc/self/fd/11,share=on,align=2M",
            ),
        ],
        QMP,
    );
    let plan = LinePlan::of(&parse(line)).unwrap();
    assert_eq!((plan.memory().bytes(), plan.managed().bytes()), (255 << 20, 256 << 20));
}

#[test]
fn json_in_single_quotes() {
    let line = "-m 1G -blockdev {'driver':'qcow2','node-name':'d','file':{'driver':'file','filename':'/vm/it\\'s.qcow2'}} -drive \
                file=json:{'driver':'raw',,'file':{'driver':'file',,'filename':'a.img'}},if=virtio -device \
                {'driver':'virtio-blk-pci','drive':'d','romfile':'/r'} -drive file=json:{'driver':'raw',,'file.filename':'b.img'}";
    golden(line, &[], &format!("{} -machine memory-backend=vmemd-ram0 {QMP}", ours("1G")));
    assert_eq!(
        outside(line),
        all(&[
            (What::Disk, "/vm/it's.qcow2"),
            (What::Disk, "a.img"),
            (What::Firmware, "/r"),
            (What::Disk, "b.img"),
        ])
    );
    let mut elsewhere = parse(line);
    absolute(&mut elsewhere, Path::new("/home/me")).unwrap();
    let names: Vec<_> = list(&elsewhere).unwrap().into_iter().map(|found| found.name).collect();
    assert_eq!(names, ["/vm/it's.qcow2", "/home/me/a.img", "/r", "/home/me/b.img"]);
    // What cannot work is seen in these as well.
    for refused in
        ["-device {'driver':'vfio-pci','host':'1:0.0'}", "-object {'qom-type':'tdx-guest','id':'t'}"]
    {
        assert!(LinePlan::of(&parse(&format!("-m 1G {refused}"))).is_err(), "{refused}");
    }
}

#[test]
fn what_another_process_has_not() {
    use What::{Descriptor, Reconnects, Screen};
    for (line, what, name) in [
        ("-drive file=/dev/fd/10", Descriptor, "/dev/fd/10"),
        ("-hda /dev/stdin", Descriptor, "/dev/stdin"),
        ("/proc/self/fd/3", Descriptor, "/proc/self/fd/3"),
        ("-drive file=file:/proc/42/fd/3", Descriptor, "/proc/42/fd/3"),
        ("-drive file=json:{'driver':'file',,'filename':'/dev/fd/3'}", Descriptor, "/dev/fd/3"),
        ("-blockdev driver=raw,file.driver=file,file.filename=//dev/./fd/3", Descriptor, "//dev/./fd/3"),
        ("-drive file=/dev/fdset/3", Descriptor, "3"),
        ("-kernel /proc/thread-self/fd/3", Descriptor, "/proc/thread-self/fd/3"),
        ("-serial file:/dev/fd/3", Descriptor, "/dev/fd/3"),
        ("-chardev file,id=a,path=/dev/stdout", Descriptor, "/dev/stdout"),
        ("-D /dev/stderr", Descriptor, "/dev/stderr"),
        ("-fw_cfg name=opt/x,file=/tmp/../dev/fd/3", Descriptor, "/tmp/../dev/fd/3"),
        ("-serial /dev/tty", Screen, "/dev/tty"),
        ("-serial /dev/pts/3", Screen, "/dev/pts/3"),
        ("-monitor /dev/tty8", Screen, "/dev/tty8"),
        ("-chardev serial,id=a,path=/dev/pts/3", Screen, "/dev/pts/3"),
        ("-chardev file,id=a,path=/dev/console", Screen, "/dev/console"),
        ("-serial file:/dev/pts/3", Screen, "/dev/pts/3"),
        ("-chardev socket,id=a,path=/s,reconnect=5", Reconnects, "/s"),
        ("-chardev socket,id=a,path=/s,server=off,reconnect-ms=50", Reconnects, "/s"),
        ("-serial unix:/s,reconnect=1", Reconnects, "/s"),
        ("-netdev stream,id=n,addr.type=unix,addr.path=/s,reconnect=1", Reconnects, "/s"),
        ("-chardev socket,id=a,path=/s,reconnect=0", What::Connects, "/s"),
    ] {
        assert_eq!(outside(line), all(&[(what, name)]), "{line}");
    }
}

#[test]
fn a_server_that_waits() {
    let line = "-m 1G -chardev socket,id=a,path=/s,server=on -serial unix:/t,server";
    let here = rewrite(line, Role::Start);
    assert_eq!(here.args[..6], line.split(' ').collect::<Vec<_>>());
    assert_eq!(here.notes.len(), 2, "{:?}", here.notes);
    let there = rewrite(line, Role::Arrive);
    assert_eq!(
        there.args[2..6].join(" "),
        "-chardev socket,id=a,path=/s,server=on,wait=off -serial unix:/t,server,wait=off"
    );
    assert_eq!(there.notes, Vec::<String>::new());
}

#[test]
fn arm() {
    golden(
        "-M virt,gic-version=3 -cpu cortex-a72 -m 2G,slots=2,maxmem=8G -bios QEMU_EFI.fd -mem-prealloc -device ramfb",
        &[("gic-version=3", "gic-version=3,memory-backend=vmemd-ram0"), (" -mem-prealloc", "")],
        &format!("{},prealloc=on {QMP}", ours("2G")),
    );
}
