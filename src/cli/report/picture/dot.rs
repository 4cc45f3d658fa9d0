//! DOT, graphviz' language.

use std::fmt::Write;

/// A directed graph under way.
pub struct Graph(String);

/// How a node is drawn.
pub struct Box<'a> {
    /// The lines of its label.
    pub lines: &'a [String],
    /// The colour that fills it, as `#rrggbb`.
    pub fill: &'a str,
    /// Whether its frame is thick.
    pub strong: bool,
}

impl Graph {
    /// A graph without nodes.
    pub fn new(name: &str) -> Graph {
        let mut text = format!("digraph \"{}\" {{\n", quoted(name));
        text.push_str(
            "  rankdir=TB; bgcolor=\"white\"; nodesep=0.25; ranksep=0.35;\n  \
             node [shape=box, style=\"rounded,filled\", fontname=\"Helvetica\", fontsize=11, \
             color=\"#44505c\", fontcolor=\"#1d2733\"];\n  edge [color=\"#7b8794\", arrowsize=0.6];\n",
        );
        Graph(text)
    }

    /// Adds the node `number`.
    pub fn node(&mut self, number: usize, node: &Box<'_>) {
        let label: Vec<String> = node.lines.iter().map(|line| quoted(line)).collect();
        let width = if node.strong { 2.5 } else { 1.0 };
        // Writing to a String does not fail.
        let _ = writeln!(
            self.0,
            "  n{number} [label=\"{}\", fillcolor=\"{}\", penwidth={width}];",
            label.join("\\n"),
            node.fill
        );
    }

    /// Adds an arrow from one node to another.
    pub fn edge(&mut self, from: usize, to: usize) {
        let _ = writeln!(self.0, "  n{from} -> n{to};");
    }

    /// The graph as text.
    pub fn finish(self) -> String {
        self.0 + "}\n"
    }
}

/// A text as it stands between quotation marks: graphviz also reads entities there.
fn quoted(text: &str) -> String {
    let text = super::plain(text);
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('&', "&amp;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hostile_name_stays_one_label() {
        let mut graph = Graph::new("x");
        let lines = ["a\"]; evil [label=\"\\".to_owned(), "&lt;b\n".to_owned()];
        graph.node(0, &Box { lines: &lines, fill: "#ffffff", strong: false });
        let text = graph.finish();
        assert!(text.contains(r#"label="a\"]; evil [label=\"\\\n&amp;lt;b"#), "{text}");
        assert_eq!(text.matches("fillcolor").count(), 1);
    }
}
