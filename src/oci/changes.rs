//! What is run in an image, and as whom: its configuration, and changes of it (OCI image specification, config.md).

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};

/// What of an image's configuration is to be otherwise (OCI image specification, config.md).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Variables, `NAME=VALUE`; they take the place of others of the same name.
    pub env: Vec<String>,
    /// The program that is always run.
    pub entrypoint: Option<Vec<String>>,
    /// What is run, or the entrypoint's arguments.
    pub cmd: Option<Vec<String>>,
    /// The working directory.
    pub workdir: Option<String>,
    /// The user, by name or number.
    pub user: Option<String>,
    /// The signal that asks it to stop, by name or number.
    pub stop_signal: Option<String>,
    /// Labels, `NAME=VALUE`.
    pub labels: Vec<String>,
}

impl Changes {
    /// Whether nothing is to be otherwise.
    pub fn is_empty(&self) -> bool {
        *self == Changes::default()
    }

    /// Makes the changes in the object that says what is run.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) for what is no NAME=VALUE.
    pub fn apply(&self, run: &mut Map<String, Value>) -> Result<()> {
        if !self.env.is_empty() {
            let mut env: Vec<String> = run
                .get("Env")
                .and_then(Value::as_array)
                .map(|a| a.iter().filter_map(Value::as_str).map(str::to_owned).collect())
                .unwrap_or_default();
            for variable in &self.env {
                let (name, _) = split(variable)?;
                env.retain(|old| old.split('=').next() != Some(name));
                env.push(variable.clone());
            }
            run.insert("Env".to_owned(), json!(env));
        }
        for (key, value) in [("Entrypoint", &self.entrypoint), ("Cmd", &self.cmd)] {
            if let Some(value) = value {
                run.insert(key.to_owned(), json!(value));
            }
        }
        let words = [
            ("WorkingDir", &self.workdir),
            ("User", &self.user),
            ("StopSignal", &self.stop_signal),
        ];
        for (key, value) in words {
            if let Some(value) = value {
                run.insert(key.to_owned(), json!(value));
            }
        }
        for label in &self.labels {
            let (name, value) = split(label)?;
            let labels = run.entry("Labels").or_insert_with(|| json!({}));
            if labels.is_null() {
                *labels = json!({});
            }
            if let Some(labels) = labels.as_object_mut() {
                labels.insert(name.to_owned(), json!(value));
            }
        }
        Ok(())
    }
}

fn split(text: &str) -> Result<(&str, &str)> {
    let parts = text.split_once('=').filter(|(name, _)| !name.is_empty());
    parts.ok_or_else(|| Error::invalid(format!("'{text}' is no NAME=VALUE")))
}
