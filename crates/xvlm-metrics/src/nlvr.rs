//! NLVR2: is the statement true of the two images?

use crate::error::{MetricsError, same_length, some};
use crate::percent;

/// Statements judged rightly, in percent.
///
/// # Errors
/// If there are none, or more or fewer predictions than labels.
pub fn accuracy(predictions: &[bool], labels: &[bool]) -> Result<f64, MetricsError> {
    const WHAT: &str = "NLVR2 predictions";
    some(WHAT, predictions.len())?;
    same_length(WHAT, labels.len(), predictions.len())?;
    let right = predictions.iter().zip(labels).filter(|(prediction, label)| prediction == label).count();
    Ok(percent(right, predictions.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_of_four() -> Result<(), MetricsError> {
        assert_eq!(accuracy(&[true, false, true, true], &[true, false, false, true])?, 75.0);
        Ok(())
    }

    #[test]
    fn nothing_and_unequal_lengths_are_refused() {
        let refused = accuracy(&[], &[]).unwrap_err().to_string();
        assert_eq!(refused, "NLVR2 predictions: expected at least one, found none");
        let refused = accuracy(&[true], &[true, false]).unwrap_err().to_string();
        assert_eq!(refused, "NLVR2 predictions: expected 2 entries, found 1");
    }
}
