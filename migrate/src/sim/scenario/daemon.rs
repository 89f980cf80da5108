//! The target's daemon, as `vmemd serve` is one, and the receiving processes that it starts.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;

use super::{SESSION_MAX, Story, TARGET};
use crate::cancel::CancelFlag;
use crate::hello::{read_hello, refuse};
use crate::limits::STREAM_TIMEOUT;
use crate::resolve::answer_resolve;
use crate::session::SessionId;
use crate::sim::coverage;
use crate::sim::engine::EngineHandle;
use crate::sim::net::{self, StdStream};
use crate::sim::runtime::timeout;
use crate::sim::vm::{Coming, is_committed};
use crate::sim::world::{ProcessId, world};
use crate::target::{DataStream, PlainMemory, StateSpool, TargetLink, TargetMemory, receive};
use crate::wire::opening::{Hello, RefuseKind, SessionHello};

/// A receiving process.
pub(super) struct Receiver {
    pub(super) process: ProcessId,
    pub(super) streams: Rc<RefCell<Handed>>,
    pub(super) cancel: Rc<CancelFlag>,
    pub(super) engine: Option<EngineHandle>,
    /// Its session has ended.
    pub(super) ended: bool,
}

/// Connections that the daemon has passed on.
#[derive(Default)]
pub(super) struct Handed {
    pub(super) queue: VecDeque<DataStream>,
    pub(super) waiting: Option<Waker>,
    pub(super) daemon: Option<ProcessId>,
}

impl Story {
    pub(super) fn serve(self: &Rc<Self>) {
        let world = world();
        let daemon = world.process("the daemon");
        net::place(daemon, TARGET);
        self.daemon.set(Some(daemon));
        let story = self.clone();
        world.spawn(daemon, move || {
            let port = net::listen(TARGET, net::PORT);
            loop {
                let (socket, story) = (port.accept(), story.clone());
                crate::sim::world::world().spawn(daemon, move || story.greet(socket, daemon));
            }
        });
    }

    fn greet(self: Rc<Self>, mut socket: StdStream, daemon: ProcessId) {
        match read_hello(&mut socket) {
            Ok(Hello::Session(hello)) => self.admit(socket, hello, daemon),
            Ok(Hello::Stream(hello)) => {
                let receivers = self.receivers.borrow();
                let taker =
                    receivers.get(&hello.session).filter(|it| !it.ended && world().is_alive(it.process));
                let handed = taker.filter(|it| it.streams.borrow().daemon == Some(daemon));
                if let Some(receiver) = handed {
                    socket.pass_to(receiver.process);
                    let mut handed = receiver.streams.borrow_mut();
                    handed.queue.push_back(DataStream { index: hello.index, socket });
                    handed.waiting.take().into_iter().for_each(Waker::wake);
                    return;
                }
                drop(receivers);
                refuse(&mut socket, RefuseKind::Other, "this session is not being received here");
            }
            Ok(Hello::Resolve { session }) => {
                let _ = answer_resolve(&mut socket, session, &self.registry);
            }
            Err(error) => world().note(|| format!("the daemon closed a connection: {error:?}")),
        }
    }

    fn admit(self: &Rc<Self>, mut control: StdStream, hello: SessionHello, daemon: ProcessId) {
        if let Some(kind) = self.turned.take() {
            return refuse(&mut control, kind, "not today");
        }
        if !self.is_quiet() || self.vm.started.get().is_some() {
            return refuse(&mut control, RefuseKind::NameTaken, "it is arriving");
        }
        let world = world();
        let process = world.process("the target");
        net::place(process, TARGET);
        control.pass_to(process);
        // Without an engine no page can be poisoned.
        let memory = if world.random.one_in(4) && !self.vm.has_lost() {
            TargetMemory::Plain(PlainMemory::new(hello.memory_bytes).expect("address space"))
        } else {
            TargetMemory::Engine(EngineHandle::new(swapd::units::pages_in(hello.memory_bytes)))
        };
        let receiver = Receiver {
            process,
            streams: Rc::new(RefCell::new(Handed { daemon: Some(daemon), ..Handed::default() })),
            cancel: Rc::default(),
            engine: match &memory {
                TargetMemory::Engine(engine) => Some(engine.clone()),
                TargetMemory::Plain(_) => None,
            },
            ended: false,
        };
        let (streams, cancel) = (receiver.streams.clone(), receiver.cancel.clone());
        let session = hello.session;
        // A session that came before is another's, also if it has the same name.
        self.receivers.borrow_mut().entry(session).or_insert(receiver);
        let story = self.clone();
        world.spawn(process, move || story.arrive(control, hello, memory, &streams, &cancel));
    }

    fn arrive(
        self: Rc<Self>,
        control: StdStream,
        hello: SessionHello,
        memory: TargetMemory,
        streams: &RefCell<Handed>,
        cancel: &CancelFlag,
    ) {
        let (began, session, me) = (world().now(), hello.session, world().me());
        let mut streams = || next_stream(streams);
        let spool = StateSpool {
            directory: "/store".into(),
            disk_bytes: u64::MAX,
            memory_bytes: [0, 1 << 20, 64 << 20][usize::from(session.0[0]) % 3],
            encrypt: false,
            lock: false,
        };
        let link = TargetLink {
            control,
            granted_ram_bytes: hello.memory_bytes,
            hello,
            streams: &mut streams,
            spool,
            registry: &self.registry,
            progress: &|_| {},
            cancel,
        };
        let mut coming = Coming { vm: self.vm.clone(), session, memory: memory.clone() };
        let result = receive(link, memory, &mut coming);
        world().note(|| format!("the target's session has ended: {result:?}"));
        let took = world().now() - began;
        assert!(took < SESSION_MAX, "the target's session took {took:?}");
        let started = self.vm.started.get() == Some((session, me));
        let how = match &result {
            Ok(_) => "arrived".to_string(),
            Err(error) => coverage::summary(error),
        };
        self.coverage.borrow_mut().target(how);
        assert!(
            started || !is_committed(session),
            "it has not been started, and is recorded as running here"
        );
        assert_eq!(
            result.is_ok(),
            started,
            "{result:?}, and it was {}started here",
            if started { "" } else { "not " }
        );
        if let TargetMemory::Engine(engine) = &coming.memory {
            engine.assert_at_rest();
        }
        if let Some(receiver) = self.receivers.borrow_mut().get_mut(&session).filter(|it| it.process == me) {
            receiver.ended = true;
            receiver.streams.borrow_mut().queue.clear();
        }
        if !started {
            // The process ends.
            let story = self.clone();
            world().after(Duration::ZERO, move || {
                world().kill(me);
                story.reap(session);
            });
        }
    }

    /// The daemon notices that a receiving process is no more.
    pub(super) fn reap(self: &Rc<Self>, session: SessionId) {
        if let Some(daemon) = self.daemon.get() {
            let story = self.clone();
            world().spawn(daemon, move || drop(story.registry.burn(session)));
        }
    }
}

fn next_stream(handed: &RefCell<Handed>) -> io::Result<DataStream> {
    let next = poll_fn(|context| {
        let mut handed = handed.borrow_mut();
        match handed.queue.pop_front() {
            Some(stream) => Poll::Ready(Ok(stream)),
            None if handed.daemon.is_none() => Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
            None => {
                handed.waiting = Some(context.waker().clone());
                Poll::Pending
            }
        }
    });
    world().block(timeout(STREAM_TIMEOUT, next)).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
