//! The error numbers that the kernel's answers are compared with.

use rustix::io::Errno;

pub(crate) const EPERM: i32 = Errno::PERM.raw_os_error();
pub(crate) const ENOENT: i32 = Errno::NOENT.raw_os_error();
pub(crate) const ESRCH: i32 = Errno::SRCH.raw_os_error();
pub(crate) const EACCES: i32 = Errno::ACCESS.raw_os_error();
pub(crate) const EBUSY: i32 = Errno::BUSY.raw_os_error();
pub(crate) const EEXIST: i32 = Errno::EXIST.raw_os_error();
pub(crate) const ENODEV: i32 = Errno::NODEV.raw_os_error();
pub(crate) const EINVAL: i32 = Errno::INVAL.raw_os_error();
pub(crate) const EOPNOTSUPP: i32 = Errno::OPNOTSUPP.raw_os_error();
pub(crate) const EAFNOSUPPORT: i32 = Errno::AFNOSUPPORT.raw_os_error();
pub(crate) const EADDRNOTAVAIL: i32 = Errno::ADDRNOTAVAIL.raw_os_error();
pub(crate) const ENETDOWN: i32 = Errno::NETDOWN.raw_os_error();
