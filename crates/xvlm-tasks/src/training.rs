//! How long a run is: in iterations, or in epochs, as the original counts.

use std::ops::{Deref, DerefMut};

use serde::de::value::MapAccessDeserializer;
use serde::de::{self, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, Visitor};
use serde::ser::{self, SerializeMap, Serializer};
use serde::{Deserialize, Serialize};
use serde_norway::Value;
use xvlm_train::TrainConfig;

/// How to train: [`TrainConfig`], but that `epochs` may stand in the place of `iterations`. How many iterations an epoch has
/// depends on the number of processes, which a file does not know; [`Self::fix_length`] works it out when a run begins.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Training {
    /// Passes over the data. If there are any, `iterations` below has no meaning yet.
    pub epochs: Option<u64>,
    /// Everything else.
    pub config: TrainConfig,
}

impl Training {
    /// Iterations in place of epochs: an epoch of `records` has as many as it takes to see them all once, the last of them
    /// perhaps with records of the next epoch; `batch` of them go into each iteration, those of all processes together
    /// (`math.ceil` in the original's scripts).
    pub fn fix_length(&mut self, records: u64, batch: u64) {
        if let Some(epochs) = self.epochs.take() {
            self.config.iterations = epochs.saturating_mul(records.div_ceil(batch.max(1))).max(1);
        }
    }
}

impl From<TrainConfig> for Training {
    fn from(config: TrainConfig) -> Self {
        Self { epochs: None, config }
    }
}

impl Deref for Training {
    type Target = TrainConfig;

    fn deref(&self) -> &TrainConfig {
        &self.config
    }
}

impl DerefMut for Training {
    fn deref_mut(&mut self) -> &mut TrainConfig {
        &mut self.config
    }
}

impl Serialize for Training {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Some(epochs) = self.epochs else { return self.config.serialize(serializer) };
        let Value::Mapping(fields) = serde_norway::to_value(&self.config).map_err(ser::Error::custom)? else {
            return Err(ser::Error::custom("expected a mapping, found a value"));
        };
        let mut map = serializer.serialize_map(Some(fields.len()))?;
        map.serialize_entry(EPOCHS, &epochs)?;
        for (name, value) in fields.iter().filter(|(name, _)| name.as_str() != Some(ITERATIONS)) {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

const EPOCHS: &str = "epochs";
const ITERATIONS: &str = "iterations";

impl<'de> Deserialize<'de> for Training {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Training;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a mapping")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Training, A::Error> {
                let (mut epochs, mut has_iterations) = (None, false);
                let rest = WithoutEpochs { map, epochs: &mut epochs, has_iterations: &mut has_iterations };
                let config = TrainConfig::deserialize(MapAccessDeserializer::new(rest))?;
                if epochs.is_some() && has_iterations {
                    let message = "expected epochs or iterations, found both (epochs: null leaves iterations)";
                    return Err(de::Error::custom(message));
                }
                Ok(Training { epochs, config })
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

/// What [`TrainConfig`] gets to see of a mapping.
struct WithoutEpochs<'a, A> {
    map: A,
    epochs: &'a mut Option<u64>,
    has_iterations: &'a mut bool,
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for WithoutEpochs<'_, A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, A::Error> {
        /// As near as only a slip of the pen is.
        const NEAR: f64 = 0.9;
        while let Some(key) = self.map.next_key::<String>()? {
            match key.as_str() {
                EPOCHS => *self.epochs = self.map.next_value()?,
                near if strsim::jaro_winkler(near, EPOCHS) > NEAR => {
                    return Err(de::Error::unknown_field(near, &[EPOCHS]));
                }
                other => {
                    *self.has_iterations |= other == ITERATIONS;
                    return seed.deserialize(key.into_deserializer()).map(Some);
                }
            }
        }
        Ok(None)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, A::Error> {
        self.map.next_value_seed(seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_stand_in_the_place_of_iterations() {
        let read = |text: &str| serde_norway::from_str::<Training>(text).map_err(|error| error.to_string());
        let mut training = read("{epochs: 3, log_every: 7}").unwrap();
        assert_eq!((training.epochs, training.log_every), (Some(3), 7));
        let text = serde_norway::to_string(&training).unwrap();
        assert!(text.starts_with("epochs: 3\n") && !text.contains("iterations"), "{text}");
        assert_eq!(read(&text).unwrap(), training);
        training.fix_length(101, 10);
        assert_eq!((training.epochs, training.iterations), (None, 33));
        let text = serde_norway::to_string(&training).unwrap();
        assert!(text.contains("iterations: 33") && !text.contains("epochs"), "{text}");
        assert_eq!(read(&text).unwrap(), training);
        training.fix_length(1, 1);
        assert_eq!(training.iterations, 33);
        assert_eq!(read("{epochs: null, iterations: 5}").unwrap().iterations, 5);
        assert_eq!(read("{}").unwrap(), Training::default());
        for (text, expected) in [
            ("{epochs: 3, iterations: 5}", "expected epochs or iterations, found both"),
            ("{epoch: 3}", "unknown field `epoch`, expected `epochs`"),
            ("{log_evry: 3}", "unknown field `log_evry`"),
            ("{epochs: many}", "u64"),
            ("{optimizer: {lr: x}}", "optimizer"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
