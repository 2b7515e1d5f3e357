//! Does: raises the engine's errors as the package's exception classes, with the same fields.

use gradwire_collectives::{CollectiveError, Member};
use gradwire_ps::PsError;
use gradwire_transport::cuda::CudaError;
use gradwire_transport::{RegisterError, TransportError};
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// The exception for an error of a collective.
pub(crate) fn collective(py: Python<'_>, error: &CollectiveError) -> PyErr {
    let text = error.to_string();
    match error {
        CollectiveError::RankFailed { operation, ranks, cause } => raise(py, "RankFailedError", &text, |fields| {
            tell_all(fields, "ranks", ranks)?;
            fields.set_item("cause", cause)?;
            fields.set_item("operation", operation.to_string())
        }),
        CollectiveError::Timeout { operation, missing, waited } => {
            raise(py, "CollectiveTimeoutError", &text, |fields| {
                tell_all(fields, "missing", missing)?;
                fields.set_item("waited_s", waited.as_secs_f64())?;
                fields.set_item("operation", operation.to_string())
            })
        }
        CollectiveError::Mismatch { operation, rank, expected, got } => {
            raise(py, "CollectiveMismatchError", &text, |fields| {
                fields.set_item("expected", expected)?;
                fields.set_item("got", got)?;
                tell(fields, rank)?;
                fields.set_item("operation", operation.to_string())
            })
        }
        CollectiveError::PartsDiffer { operation, sender, receiver, sent, awaited } => {
            raise(py, "CollectiveMismatchError", &text, |fields| {
                fields.set_item("expected", format!("{awaited} elements for {}", receiver.rank))?;
                fields.set_item("got", format!("{sent} elements for {}", receiver.rank))?;
                tell(fields, sender)?;
                fields.set_item("operation", operation.to_string())
            })
        }
        CollectiveError::NotANumber { operation, rank, element } => raise(py, "NotANumberError", &text, |fields| {
            fields.set_item("rank", rank.rank.0)?;
            fields.set_item("host", &rank.host)?;
            fields.set_item("pid", rank.pid)?;
            fields.set_item("element", element)?;
            fields.set_item("operation", operation.to_string())
        }),
        CollectiveError::Invalid { .. } => PyValueError::new_err(format!("{text}. Nothing was sent")),
        CollectiveError::WrongLength { from, tag, expected_bytes, got_bytes } => {
            raise(py, "MessageLengthError", &text, |fields| {
                fields.set_item("source", from.0)?;
                fields.set_item("tag", tag)?;
                fields.set_item("expected_bytes", expected_bytes)?;
                fields.set_item("got_bytes", got_bytes)
            })
        }
        CollectiveError::Aborted { reason } => {
            raise(py, "GroupAbortedError", &text, |fields| fields.set_item("reason", reason))
        }
        CollectiveError::Register(error) => register(py, error),
        CollectiveError::Transport(error) => transport(py, error),
        CollectiveError::Cuda(error) => cuda(py, error),
        _ => raise(py, "GradwireError", &text, |_| Ok(())),
    }
}

/// Who it is, in fields of their own.
fn tell(fields: &Bound<'_, PyDict>, member: &Member) -> PyResult<()> {
    fields.set_item("rank", member.rank.0)?;
    fields.set_item("host", &member.host)?;
    fields.set_item("pid", member.pid)
}

/// The same of several, their ranks in the field `ranks`.
fn tell_all(fields: &Bound<'_, PyDict>, ranks: &str, members: &[Member]) -> PyResult<()> {
    fields.set_item(ranks, members.iter().map(|member| member.rank.0).collect::<Vec<_>>())?;
    fields.set_item("hosts", members.iter().map(|member| member.host.clone()).collect::<Vec<_>>())?;
    fields.set_item("pids", members.iter().map(|member| member.pid).collect::<Vec<_>>())
}

/// The exception for an error of the transport, or of the making of a group.
pub(crate) fn transport(py: Python<'_>, error: &TransportError) -> PyErr {
    let text = error.to_string();
    match error {
        TransportError::Authentication { address, reason } => raise(py, "AuthenticationError", &text, |fields| {
            fields.set_item("address", address)?;
            fields.set_item("reason", reason)
        }),
        TransportError::Tls { address, reason, remedy } => raise(py, "TlsError", &text, |fields| {
            fields.set_item("address", address)?;
            fields.set_item("reason", &**reason)?;
            fields.set_item("remedy", &**remedy)
        }),
        TransportError::Timeout { what, waited } => raise(py, "RendezvousTimeoutError", &text, |fields| {
            fields.set_item("what", what)?;
            fields.set_item("waited_s", waited.as_secs_f64())
        }),
        TransportError::Unreachable { who, .. } => raise(py, "RendezvousTimeoutError", &text, |fields| {
            fields.set_item("what", who)?;
            fields.set_item("waited_s", 0.0)
        }),
        TransportError::Config { .. } => PyValueError::new_err(text),
        _ => raise(py, "TransportError", &text, |_| Ok(())),
    }
}

/// The exception for memory that a device does not take.
pub(crate) fn register(py: Python<'_>, error: &RegisterError) -> PyErr {
    let bytes = match error {
        RegisterError::LockedMemoryLimit { bytes, .. } | RegisterError::Device { bytes, .. } => *bytes,
        _ => 0,
    };
    raise(py, "RegistrationError", &error.to_string(), |fields| fields.set_item("bytes", bytes))
}

/// The exception for memory of a CUDA device that cannot be used.
pub(crate) fn cuda(py: Python<'_>, error: &CudaError) -> PyErr {
    let (call, code) = match error {
        CudaError::Refused { call, code, .. } => (*call, *code),
        _ => ("", 0),
    };
    raise(py, "CudaError", &error.to_string(), |fields| {
        fields.set_item("call", call)?;
        fields.set_item("code", code)
    })
}

/// The exception for an error of the parameter server.
pub(crate) fn ps(py: Python<'_>, error: &PsError) -> PyErr {
    let text = error.to_string();
    match error {
        PsError::ServerLost { shard, address, cause } => raise(py, "ServerLostError", &text, |fields| {
            fields.set_item("shard", shard)?;
            fields.set_item("address", address)?;
            fields.set_item("cause", cause)
        }),
        // To who trains it is the same: what it had of the servers does not hold any more, and it is to recover.
        PsError::Recovering { shard, address, refusal } => raise(py, "ServerLostError", &text, |fields| {
            fields.set_item("shard", shard)?;
            fields.set_item("address", address)?;
            fields.set_item("cause", refusal.to_string())
        }),
        PsError::Authentication { address, reason } => raise(py, "AuthenticationError", &text, |fields| {
            fields.set_item("address", address)?;
            fields.set_item("reason", reason)
        }),
        PsError::Refused { shard, address, refusal } => raise(py, "ServerRefusedError", &text, |fields| {
            fields.set_item("shard", shard)?;
            fields.set_item("address", address)?;
            fields.set_item("subject", &refusal.subject)?;
            fields.set_item("what", &refusal.what)?;
            fields.set_item("expected", &refusal.expected)?;
            fields.set_item("got", &refusal.got)
        }),
        PsError::Timeout { what, waited } => raise(py, "ServerTimeoutError", &text, |fields| {
            fields.set_item("what", what)?;
            fields.set_item("waited_s", waited.as_secs_f64())
        }),
        PsError::Invalid { .. } => PyValueError::new_err(text),
        PsError::Transport(error) => transport(py, error),
        _ => raise(py, "GradwireError", &text, |_| Ok(())),
    }
}

fn raise(py: Python<'_>, class: &str, text: &str, fill: impl FnOnce(&Bound<'_, PyDict>) -> PyResult<()>) -> PyErr {
    let made = py.import("gradwire.errors").and_then(|module| {
        let fields = PyDict::new(py);
        fill(&fields)?;
        module.getattr(class)?.call((text,), Some(&fields))
    });
    match made {
        Ok(exception) => PyErr::from_value(exception),
        Err(other) => PyRuntimeError::new_err(format!("{text} (raised plainly, since {class} could not be: {other})")),
    }
}

/// A failure that has no class of its own.
pub(crate) fn plain(text: String) -> PyErr {
    PyRuntimeError::new_err(text)
}
