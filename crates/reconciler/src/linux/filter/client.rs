//! Carries out the packet filter's operations of plans, each run of operations as one transaction.

use ipvs_netlink::Family;
use netlink_batch::{Error, Refusal, Socket};

use super::message::{OWNED, PERSIST, Transaction};
use super::read;
use crate::filter::ruleset::Ruleset;
use crate::filter::{FrontEndElements, ObservedFilter, SetElement, TABLE, TableContents};
use crate::kernel::{Cause, KernelError};
use crate::linux::errno::{EBUSY, EEXIST, ENOENT, EPERM};
use crate::node::NodeView;
use crate::plan::Operation;
use crate::policy::{Families, Policy};

/// At most this many operations in a transaction: some 200 KB of messages.
const TRANSACTION_OPERATIONS: usize = 2000;

/// A hint for a kernel that lacks a part of `nf_tables`. It loads modules automatically if it can.
const MODULES: &str = "it requires CAP_NET_ADMIN and the modules nf_tables nft_chain_nat nft_ct nft_masq nft_nat nft_reject_ipv4 \
                       nft_reject_ipv6 nft_fib_ipv4 nft_fib_ipv6: load them with `modprobe -a`";

/// The result of one operation.
type OperationResult = Result<(), KernelError>;

/// Reads the tables of the families that the node serves.
pub(crate) fn observe(socket: &mut Socket, families: Families, owned: bool) -> Result<ObservedFilter, KernelError> {
    read::read(socket, families, owned).map_err(|error| {
        let hint = error.refusal().map_or("", |refusal| hint(refusal.errno));
        KernelError { cause: Cause::Refused, text: format!("cannot read the packet filter: {error}{hint}") }
    })
}

/// Creates the tables and deletes them again in one transaction.
pub(crate) fn probe(socket: &mut Socket, policy: &Policy) -> Result<(), KernelError> {
    let failed = |reason: &dyn std::fmt::Display| KernelError {
        cause: Cause::Refused,
        text: format!("this kernel does not support the packet filter: {reason}; {MODULES}"),
    };
    let tables = read::tables(socket, policy.families.iter()).map_err(|error| failed(&error))?;
    let missing = policy.families.iter().filter(|family| !tables.iter().any(|(it, _)| it == family));
    let mut transaction = Transaction::default();
    for family in missing {
        transaction.build(&Ruleset::new(family, policy, &NodeView::default()), false, &TableContents::default());
        transaction.delete_table(family, TABLE);
    }
    let result = send(socket, transaction).map_err(|error| failed(&error))?;
    result.map_err(|refusal| failed(&refusal))
}

/// Whether the kernel lets a socket own tables that outlive it (Linux 6.9), found out by creating and deleting such a table in one
/// transaction.
pub(crate) fn supports_ownership(socket: &mut Socket) -> Result<bool, Error> {
    let name = format!("{TABLE}-probe-{}", std::process::id());
    let mut transaction = Transaction::new(true);
    transaction.own_table(Family::Ipv4, &name);
    transaction.delete_table(Family::Ipv4, &name);
    Ok(send(socket, transaction)?.is_ok())
}

/// Takes possession of the tables that an agent left when it ended. Returns whether no table is left that belongs to nobody. One that
/// belongs to another socket stays as it is.
pub(crate) fn adopt(socket: &mut Socket, families: Families) -> Result<bool, Error> {
    let mut is_complete = true;
    for (family, flags) in read::tables(socket, families.iter())? {
        if flags & OWNED.bits() == PERSIST.bits() {
            let mut transaction = Transaction::new(true);
            transaction.own_table(family, TABLE);
            if let Err(refusal) = send(socket, transaction)? {
                tracing::debug!(%family, "cannot own the table {TABLE}: {refusal}");
                is_complete = false;
            }
        }
    }
    Ok(is_complete)
}

/// Deletes the tables of these families. Returns whether there was one.
pub(crate) fn delete(socket: &mut Socket, families: Families) -> Result<bool, KernelError> {
    let failed = |error: &dyn std::fmt::Display| KernelError {
        cause: Cause::Refused,
        text: format!("cannot delete the tables of the packet filter: {error}"),
    };
    let tables = read::tables(socket, families.iter()).map_err(|error| failed(&error))?;
    let mut transaction = Transaction::default();
    for (family, _) in &tables {
        transaction.delete_table(*family, TABLE);
    }
    let result = send(socket, transaction).map_err(|error| failed(&error))?;
    result.map(|()| !tables.is_empty()).map_err(|refusal| failed(&refusal))
}

/// Carries out operations on the packet filter and returns a result for each. `Err` means that the socket failed.
///
/// If `owned`, tables that are built belong to the socket and outlive it.
pub(crate) fn apply(socket: &mut Socket, operations: &[Operation], owned: bool) -> Result<Vec<OperationResult>, Error> {
    let mut results = Vec::with_capacity(operations.len());
    for chunk in operations.chunks(TRANSACTION_OPERATIONS) {
        commit(socket, chunk, owned, &mut results)?;
    }
    Ok(results)
}

/// Commits operations as one transaction. If it is refused, its halves are tried separately, down to the operation at fault, so that
/// the others take effect.
fn commit(
    socket: &mut Socket,
    operations: &[Operation],
    owned: bool,
    results: &mut Vec<OperationResult>,
) -> Result<(), Error> {
    let mut transaction = Transaction::new(owned);
    for operation in operations {
        add_to_transaction(operation, &mut transaction);
    }
    match (send(socket, transaction)?, operations) {
        (Ok(()), _) => results.extend(operations.iter().map(|_| Ok(()))),
        (Err(refusal), [operation]) => results.push(Err(refused(operation, &refusal))),
        (Err(_), _) => {
            let (first, second) = operations.split_at(operations.len() / 2);
            commit(socket, first, owned, results)?;
            commit(socket, second, owned, results)?;
        }
    }
    Ok(())
}

/// The inner result is the kernel's first refusal.
fn send(socket: &mut Socket, transaction: Transaction) -> Result<Result<(), Refusal>, Error> {
    let (begin, end) = Transaction::begin_and_end();
    let result = socket.transaction(&begin, transaction.into_requests(), &end)?;
    Ok(result.map_err(|(_, refusal)| refusal))
}

fn add_to_transaction(operation: &Operation, transaction: &mut Transaction) {
    match operation {
        Operation::BuildTable { ruleset, replaces, contents } => transaction.build(ruleset, *replaces, contents),
        Operation::SetSourceRanges(service, family, ranges) => transaction.set_source_ranges(service, *family, ranges),
        Operation::RemoveSourceRanges(service, family) => transaction.remove_source_ranges(service, *family),
        Operation::SetFrontEnd { front_end, before, after } => transaction.set_front_end(*front_end, before, after),
        Operation::RemoveFrontEnd(front_end, before) => {
            transaction.set_front_end(*front_end, before, &FrontEndElements::default());
        }
        Operation::AddElement(element) => transaction.add_element(*element),
        Operation::RemoveElement(element) => transaction.remove_element(*element),
        Operation::AddRoutedVip(address) => transaction.add_element(SetElement::Vip(*address)),
        Operation::RemoveRoutedVip(address) => transaction.remove_element(SetElement::Vip(*address)),
        // Operations on other parts of the kernel.
        _ => {}
    }
}

fn refused(operation: &Operation, refusal: &Refusal) -> KernelError {
    let cause = match refusal.errno {
        // EBUSY: an element exists with other data, or a chain is in use. Another program has changed the table.
        EEXIST | EBUSY => Cause::Exists,
        ENOENT => Cause::NotFound,
        _ => Cause::Refused,
    };
    KernelError { cause, text: format!("cannot {operation}: {refusal}{}", hint(refusal.errno)) }
}

fn hint(errno: i32) -> &'static str {
    match errno {
        EPERM => ": it requires CAP_NET_ADMIN, and that no other program owns the table (`nft list table`)",
        _ => "",
    }
}
