//! A node with clients and honest Services, whose traffic must lose nothing whatever happens to the agent: for `soak` and `attack`.

pub(crate) mod cluster;
pub(crate) mod kernel_state;
pub(crate) mod record;
pub(crate) mod traffic;
