use super::*;

/// A machine with a disk on that image, as QEMU tells it.
fn answers(image: Value) -> Vec<Value> {
    let file = image["filename"].clone();
    vec![
        json!([
            { "device": "d0", "inserted": { "image": image, "file": file, "ro": false, "iops": 0, "bps": 0 } },
            { "device": "", "qdev": "/machine/peripheral/cd", "inserted": null, "tray_open": false },
        ]),
        json!([
            { "node-name": "#block063", "file": "a", "drv": "file" },
            { "node-name": "mine", "file": "a", "drv": "raw" },
        ]),
        json!([{ "cpu-index": 0 }, { "cpu-index": 1 }]),
        json!([
            { "label": "vmemd-qmp", "filename": "unix:" },
            { "label": "c0", "filename": "disconnected:tcp:localhost:4444,server=on" },
            { "label": "c1", "filename": "disconnected:unix:/s,server=on" },
        ]),
        json!([{ "id": "default", "server": [{ "family": "ipv4", "host": "0.0.0.0", "service": "5900" }] }]),
        json!([{ "name": "type", "type": "string" }, { "name": "net", "type": "child<e1000>" }]),
        json!([{ "name": "device[0]", "type": "child<virtio-blk-pci>" }]),
        json!([{ "name": "io0", "type": "child<iothread>" }]),
        json!(
            "net: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:56\r\n \\ n0: index=0,type=user,net=10.0.2.0,restrict=off\r\n"
        ),
        json!(
            "Hub -1 (n0):\r\n  TCP[HOST_FORWARD]  12 127.0.0.1 5555 10.0.2.15 22 0 0\r\n  TCP[ESTABLISHED] 9 a 1 b 2 0 0\r\n"
        ),
    ]
}

fn base() -> Value {
    json!({ "filename": "base.img", "format": "raw", "actual-size": 1 })
}

#[test]
fn a_machine_that_lives_stays_the_same() {
    let then = Inventory::new(&answers(base()));
    let mut now = answers(base());
    now[0][0]["inserted"]["image"]["actual-size"] = json!(70000);
    now[0][1]["tray_open"] = json!(true);
    now[3][1]["filename"] = json!("tcp:127.0.0.1:4444,server=on <-> 127.0.0.1:50000");
    now[3][2]["filename"] = json!("unix:/s,server=on");
    assert_eq!(Inventory::new(&now).changes(&then), Vec::<String>::new());
    assert_eq!(Inventory::new(&[]).changes(&Inventory::new(&[Value::Null, json!({})])), Vec::<String>::new());
}

#[test]
fn each_change_is_told_with_both_names() {
    let then = Inventory::new(&answers(base()));
    let snapshot = json!({ "filename": "snap.qcow2", "format": "qcow2", "backing-image": base() });
    let told = |at: &[&str], value: Value| {
        let mut now = Value::Array(answers(base()));
        now.pointer_mut(at[0]).map(|place| *place = value).expect(at[0]);
        Inventory::new(now.as_array().unwrap()).changes(&then).join("; ")
    };
    for (at, value, says) in [
        (
            "/0/0/inserted/image",
            snapshot,
            "disk d0 is now snap.qcow2 (qcow2) on base.img (raw), it was started with base.img (raw)",
        ),
        ("/0/0/inserted/ro", json!(true), "disk d0 is now base.img (raw), read-only, it was started with"),
        ("/0/0/inserted/iops", json!(100), "I/O limit of disk d0 is now iops=100, it was started with none"),
        ("/0/0/inserted", Value::Null, "disk d0 is now empty, it was started with base.img (raw)"),
        (
            "/0/1/inserted",
            json!({ "image": base() }),
            "disk cd is now base.img (raw), it was started with empty",
        ),
        ("/1/1/drv", json!("qcow2"), "block node mine is now a (qcow2), it was started with a (raw)"),
        ("/1/0/node-name", json!("new"), "block node new was added"),
        ("/2", json!([{}]), "number of processors is now 1, it was started with 2"),
        (
            "/3/1/filename",
            json!("pty:/dev/pts/1"),
            "chardev c0 is now pty:/dev/pts/1, it was started with tcp",
        ),
        ("/3/2/filename", json!("unix:/t,server=on"), "chardev c1 is now unix:/t,server=on, it was"),
        ("/4/0/server/0/service", json!("5901"), "VNC server default is now ipv4 0.0.0.0 5901, it was"),
        ("/5/1/name", json!("other"), "device net was removed; device other was added"),
        ("/6", json!([]), "device device[0] was removed"),
        ("/7/0/type", json!("child<secret>"), "object io0 is now secret, it was started with iothread"),
        (
            "/8",
            json!(" \\ n0: index=0,type=tap,ifname=t\r\n"),
            "netdev n0 is now tap,ifname=t, it was started",
        ),
        ("/9", json!("Hub -1 (n0):\r\n"), "port TCP 127.0.0.1:5555 was removed"),
        ("/8", json!("n1: index=0,type=socket,connected\r\n"), "netdev n0 was removed; netdev n1 was added"),
    ] {
        let told = told(&[at], value);
        assert!(told.contains(says), "{at}: {told}");
    }
}

#[test]
fn long_names_are_cut_only_to_be_shown() {
    let node = |end: &str| json!({ "filename": format!("json:{}{end}", "ä".repeat(300)), "format": "raw" });
    let (then, now) = (Inventory::new(&answers(node("a"))), Inventory::new(&answers(node("b"))));
    let told = now.changes(&then);
    assert!(told.len() == 1 && told[0].len() < 700, "{told:?}");
}
