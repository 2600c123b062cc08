//! What the agent runs for ([`RunMode`]), and why it ended without an error ([`ExitReason`]).

/// What the agent runs for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RunMode {
    /// Serve until a signal.
    Serve,
    /// Sync once (`--once`). Any operation that the kernel refuses is an error.
    Once,
    /// Sync once, before kube-proxy's rules are removed (`takeover`). An operation that the kernel refuses for one
    /// Service is only a warning: another proxy would be refused too, and users who may create Services must not be
    /// able to prevent a takeover.
    Takeover,
}

impl RunMode {
    /// Whether the agent exits after the first sync.
    pub(crate) fn is_one_shot(self) -> bool {
        self != Self::Serve
    }
}

/// Why the agent ended, where that is not an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExitReason {
    /// The command or the single sync is done.
    Completed,
    /// A signal asked it to stop.
    Stopped,
    /// The configuration has changed, and the program must be executed again.
    Restart,
}
