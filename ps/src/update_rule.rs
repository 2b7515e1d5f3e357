//! Pure: what a server does with a summed gradient: the rules, their numbers, and how they travel.

use crate::body::{BadBody, Reader, Writer};
use std::fmt;

/// How a table takes the gradient of a clock.
///
/// The formulas, and the order of their operations, are those of `torch.optim` (2.15, CPU, one tensor at a time), in the
/// table's own precision and without fused multiply-add, so that every machine computes the same bits.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum UpdateRule {
    /// Adds the gradient to the value.
    Sum,
    /// Makes the gradient the value: what is pulled is the sum over the workers, and the optimizer stays with them.
    Replace,
    /// `torch.optim.SGD`, with momentum where it is not 0.
    Sgd(Sgd),
    /// `torch.optim.Adam`, or `AdamW` where the weight decay is decoupled.
    Adam(Adam),
    /// `torch.optim.Adagrad`, or its row-wise kind, which keeps one number a row.
    Adagrad(Adagrad),
    /// FTRL-Proximal (McMahan et al., KDD 2013): many weights come out as exactly 0.
    Ftrl(Ftrl),
}

/// The numbers of stochastic gradient descent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Step size. Default 0.001.
    pub learning_rate: f64,
    /// Share of the last step that is kept. Default 0: no state is held.
    pub momentum: f64,
    /// Share of the gradient that momentum leaves out. Default 0.
    pub dampening: f64,
    /// Share of the value that is added to the gradient. Default 0.
    pub weight_decay: f64,
    /// Whether the step looks ahead along the momentum. Default false.
    pub nesterov: bool,
}

impl Default for Sgd {
    fn default() -> Self {
        Self { learning_rate: 1e-3, momentum: 0.0, dampening: 0.0, weight_decay: 0.0, nesterov: false }
    }
}

/// The numbers of Adam.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adam {
    /// Step size. Default 0.001.
    pub learning_rate: f64,
    /// Decay of the mean of gradients. Default 0.9.
    pub beta1: f64,
    /// Decay of the mean of squared gradients. Default 0.999.
    pub beta2: f64,
    /// Added to the root, so that nothing is divided by 0. Default 1e-8.
    pub epsilon: f64,
    /// Weight decay. Default 0; AdamW's is 0.01.
    pub weight_decay: f64,
    /// Whether the weight decay shrinks the value itself (AdamW) or is added to the gradient (Adam). Default false.
    pub decoupled: bool,
}

impl Default for Adam {
    fn default() -> Self {
        Self { learning_rate: 1e-3, beta1: 0.9, beta2: 0.999, epsilon: 1e-8, weight_decay: 0.0, decoupled: false }
    }
}

/// The numbers of Adagrad.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adagrad {
    /// Step size. Default 0.01.
    pub learning_rate: f64,
    /// What the step size is divided by, less 1, for each step before. Default 0.
    pub learning_rate_decay: f64,
    /// The sum of squares to begin with. Default 0.
    pub initial: f64,
    /// Added to the root, so that nothing is divided by 0. Default 1e-10.
    pub epsilon: f64,
    /// Share of the value that is added to the gradient. Default 0.
    pub weight_decay: f64,
    /// Whether a row keeps one sum, of the means of its squares, in place of one for each element. Default false.
    pub row_wise: bool,
}

impl Default for Adagrad {
    fn default() -> Self {
        Self {
            learning_rate: 0.01,
            learning_rate_decay: 0.0,
            initial: 0.0,
            epsilon: 1e-10,
            weight_decay: 0.0,
            row_wise: false,
        }
    }
}

/// The numbers of FTRL-Proximal, by the names of its paper.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ftrl {
    /// Step size (the paper's alpha), more than 0. Default 0.05.
    pub learning_rate: f64,
    /// Added to the root of the sum of squares. Default 1.
    pub beta: f64,
    /// Weight of the sum of magnitudes: what stays below it is 0. Default 0.
    pub l1: f64,
    /// Weight of the sum of squares. Default 0.
    pub l2: f64,
}

impl Default for Ftrl {
    fn default() -> Self {
        Self { learning_rate: 0.05, beta: 1.0, l1: 0.0, l2: 0.0 }
    }
}

impl UpdateRule {
    /// The learning rate, where the rule has one.
    pub const fn learning_rate(&self) -> Option<f64> {
        match self {
            Self::Sum | Self::Replace => None,
            Self::Sgd(sgd) => Some(sgd.learning_rate),
            Self::Adam(adam) => Some(adam.learning_rate),
            Self::Adagrad(adagrad) => Some(adagrad.learning_rate),
            Self::Ftrl(ftrl) => Some(ftrl.learning_rate),
        }
    }

    /// The same rule with another learning rate; itself where it has none.
    pub const fn with_learning_rate(self, learning_rate: f64) -> Self {
        match self {
            Self::Sgd(sgd) => Self::Sgd(Sgd { learning_rate, ..sgd }),
            Self::Adam(adam) => Self::Adam(Adam { learning_rate, ..adam }),
            Self::Adagrad(adagrad) => Self::Adagrad(Adagrad { learning_rate, ..adagrad }),
            Self::Ftrl(ftrl) => Self::Ftrl(Ftrl { learning_rate, ..ftrl }),
            other => other,
        }
    }

    /// How many numbers it remembers for each element beside the value.
    pub const fn state_per_element(&self) -> usize {
        match self {
            Self::Sum | Self::Replace => 0,
            Self::Sgd(sgd) => (sgd.momentum != 0.0) as usize,
            Self::Adagrad(adagrad) => !adagrad.row_wise as usize,
            Self::Adam(_) | Self::Ftrl(_) => 2,
        }
    }

    /// How many numbers it remembers for a row of `elements`, in its first state and in its second.
    pub(crate) const fn state_of_row(&self, elements: usize) -> [usize; 2] {
        match self {
            Self::Adagrad(Adagrad { row_wise: true, .. }) => [1, 0],
            _ => match self.state_per_element() {
                0 => [0, 0],
                1 => [elements, 0],
                _ => [elements, elements],
            },
        }
    }

    /// What its state holds at first.
    pub(crate) const fn first_state(&self) -> f64 {
        match self {
            Self::Adagrad(adagrad) => adagrad.initial,
            _ => 0.0,
        }
    }

    /// Says what is wrong with the numbers, if anything is.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Self::Sum | Self::Replace => Ok(()),
            Self::Sgd(sgd) => {
                at_least_0("learning_rate", sgd.learning_rate)?;
                at_least_0("momentum", sgd.momentum)?;
                at_least_0("weight_decay", sgd.weight_decay)?;
                if !sgd.dampening.is_finite() {
                    return Err(format!("dampening is {}", sgd.dampening));
                }
                if sgd.nesterov && (sgd.momentum == 0.0 || sgd.dampening != 0.0) {
                    return Err("nesterov needs a momentum and no dampening".to_owned());
                }
                Ok(())
            }
            Self::Adam(adam) => {
                at_least_0("learning_rate", adam.learning_rate)?;
                at_least_0("epsilon", adam.epsilon)?;
                at_least_0("weight_decay", adam.weight_decay)?;
                for (name, beta) in [("beta1", adam.beta1), ("beta2", adam.beta2)] {
                    if !(0.0..1.0).contains(&beta) {
                        return Err(format!("{name} is {beta}, and must lie in 0 <= {name} < 1"));
                    }
                }
                Ok(())
            }
            Self::Adagrad(adagrad) => {
                at_least_0("learning_rate", adagrad.learning_rate)?;
                at_least_0("learning_rate_decay", adagrad.learning_rate_decay)?;
                at_least_0("initial", adagrad.initial)?;
                at_least_0("epsilon", adagrad.epsilon)?;
                at_least_0("weight_decay", adagrad.weight_decay)
            }
            Self::Ftrl(ftrl) => {
                if ftrl.learning_rate.is_nan() || ftrl.learning_rate <= 0.0 {
                    return Err(format!("learning_rate is {}, and FTRL divides by it", ftrl.learning_rate));
                }
                at_least_0("learning_rate", ftrl.learning_rate)?;
                at_least_0("beta", ftrl.beta)?;
                at_least_0("l1", ftrl.l1)?;
                at_least_0("l2", ftrl.l2)
            }
        }
    }

    pub(crate) fn encode(&self, out: &mut Writer) {
        match self {
            Self::Sum => out.byte(0),
            Self::Replace => out.byte(1),
            Self::Sgd(Sgd { learning_rate, momentum, dampening, weight_decay, nesterov }) => {
                out.byte(2);
                [learning_rate, momentum, dampening, weight_decay].into_iter().for_each(|&value| out.float(value));
                out.byte((*nesterov).into());
            }
            Self::Adam(Adam { learning_rate, beta1, beta2, epsilon, weight_decay, decoupled }) => {
                out.byte(3);
                [learning_rate, beta1, beta2, epsilon, weight_decay].into_iter().for_each(|&value| out.float(value));
                out.byte((*decoupled).into());
            }
            Self::Adagrad(Adagrad { learning_rate, learning_rate_decay, initial, epsilon, weight_decay, row_wise }) => {
                out.byte(4);
                let numbers = [learning_rate, learning_rate_decay, initial, epsilon, weight_decay];
                numbers.into_iter().for_each(|&value| out.float(value));
                out.byte((*row_wise).into());
            }
            Self::Ftrl(Ftrl { learning_rate, beta, l1, l2 }) => {
                out.byte(5);
                [learning_rate, beta, l1, l2].into_iter().for_each(|&value| out.float(value));
            }
        }
    }

    pub(crate) fn decode(from: &mut Reader<'_>) -> Result<Self, BadBody> {
        let flag = |byte: u8| if byte < 2 { Ok(byte == 1) } else { Err(BadBody("a flag is neither 0 nor 1")) };
        Ok(match from.byte()? {
            0 => Self::Sum,
            1 => Self::Replace,
            2 => Self::Sgd(Sgd {
                learning_rate: from.float()?,
                momentum: from.float()?,
                dampening: from.float()?,
                weight_decay: from.float()?,
                nesterov: flag(from.byte()?)?,
            }),
            3 => Self::Adam(Adam {
                learning_rate: from.float()?,
                beta1: from.float()?,
                beta2: from.float()?,
                epsilon: from.float()?,
                weight_decay: from.float()?,
                decoupled: flag(from.byte()?)?,
            }),
            4 => Self::Adagrad(Adagrad {
                learning_rate: from.float()?,
                learning_rate_decay: from.float()?,
                initial: from.float()?,
                epsilon: from.float()?,
                weight_decay: from.float()?,
                row_wise: flag(from.byte()?)?,
            }),
            5 => Self::Ftrl(Ftrl {
                learning_rate: from.float()?,
                beta: from.float()?,
                l1: from.float()?,
                l2: from.float()?,
            }),
            _ => return Err(BadBody("no such update rule")),
        })
    }
}

impl fmt::Display for UpdateRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sum => write!(f, "sum"),
            Self::Replace => write!(f, "replace"),
            Self::Sgd(Sgd { learning_rate, momentum, dampening, weight_decay, nesterov }) => write!(
                f,
                "sgd(learning_rate={learning_rate}, momentum={momentum}, dampening={dampening}, \
                 weight_decay={weight_decay}, nesterov={nesterov})"
            ),
            Self::Adam(Adam { learning_rate, beta1, beta2, epsilon, weight_decay, decoupled }) => write!(
                f,
                "{}(learning_rate={learning_rate}, beta1={beta1}, beta2={beta2}, epsilon={epsilon}, \
                 weight_decay={weight_decay})",
                if *decoupled { "adamw" } else { "adam" }
            ),
            Self::Adagrad(Adagrad { learning_rate, learning_rate_decay, initial, epsilon, weight_decay, row_wise }) => {
                write!(
                    f,
                    "{}(learning_rate={learning_rate}, learning_rate_decay={learning_rate_decay}, initial={initial}, \
                     epsilon={epsilon}, weight_decay={weight_decay})",
                    if *row_wise { "row-wise adagrad" } else { "adagrad" }
                )
            }
            Self::Ftrl(Ftrl { learning_rate, beta, l1, l2 }) => {
                write!(f, "ftrl(learning_rate={learning_rate}, beta={beta}, l1={l1}, l2={l2})")
            }
        }
    }
}

fn at_least_0(name: &str, value: f64) -> Result<(), String> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    Err(format!("{name} is {value}, and must be at least 0"))
}
