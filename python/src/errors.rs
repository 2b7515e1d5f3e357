//! Pure: Rust's errors as Python's, with the same fields. The classes are in `gradwire.errors`.

use gradwire_collectives::{CollectiveError, Member};
use gradwire_transport::TransportError;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

/// `gradwire.errors.<name>(message, **fields)`.
fn raise(py: Python<'_>, name: &str, message: String, fields: &Bound<'_, PyDict>) -> PyErr {
    let made = py
        .import("gradwire.errors")
        .and_then(|module| module.getattr(name))
        .and_then(|class| class.call((message,), Some(fields)));
    match made {
        Ok(error) => PyErr::from_value(error),
        Err(error) => error,
    }
}

/// The exception for a failed collective.
pub(crate) fn collective(py: Python<'_>, error: &CollectiveError) -> PyErr {
    let fields = PyDict::new(py);
    match fill(py, error, &fields) {
        Ok(Some(name)) => raise(py, name, error.to_string(), &fields),
        Ok(None) => match error {
            CollectiveError::Transport(error) => transport(py, error),
            other => PyValueError::new_err(other.to_string()),
        },
        Err(error) => error,
    }
}

fn fill(py: Python<'_>, error: &CollectiveError, fields: &Bound<'_, PyDict>) -> PyResult<Option<&'static str>> {
    let ranks = |members: &[Member]| PyTuple::new(py, members.iter().map(|member| member.rank.0));
    Ok(match error {
        CollectiveError::RankFailed { ranks: failed, cause, .. } => {
            fields.set_item("ranks", ranks(failed)?)?;
            fields.set_item("hosts", PyTuple::new(py, failed.iter().map(|member| member.host.as_str()))?)?;
            fields.set_item("pids", PyTuple::new(py, failed.iter().map(|member| member.pid))?)?;
            fields.set_item("cause", cause)?;
            Some("RankFailedError")
        }
        CollectiveError::Timeout { missing, waited, .. } => {
            fields.set_item("missing", ranks(missing)?)?;
            fields.set_item("waited_s", waited.as_secs_f64())?;
            Some("CollectiveTimeoutError")
        }
        CollectiveError::Mismatch { rank, expected, got, .. } => {
            fields.set_item("rank", rank.rank.0)?;
            fields.set_item("expected", expected)?;
            fields.set_item("got", got)?;
            Some("CollectiveMismatchError")
        }
        CollectiveError::WrongLength { from, expected_bytes, got_bytes, .. } => {
            fields.set_item("rank", from.0)?;
            fields.set_item("expected", format!("{expected_bytes} bytes"))?;
            fields.set_item("got", format!("{got_bytes} bytes"))?;
            Some("CollectiveMismatchError")
        }
        CollectiveError::Aborted { .. } => Some("GroupAbortedError"),
        _ => None,
    })
}

/// The exception for a failure of the transport.
pub(crate) fn transport(py: Python<'_>, error: &TransportError) -> PyErr {
    let fields = PyDict::new(py);
    let name = match error {
        TransportError::Authentication { address, .. } => {
            if let Err(error) = fields.set_item("address", address) {
                return error;
            }
            "AuthenticationError"
        }
        TransportError::Timeout { .. } => "RendezvousTimeoutError",
        TransportError::Config { .. } => return PyValueError::new_err(error.to_string()),
        _ => "GradwireError",
    };
    raise(py, name, error.to_string(), &fields)
}
