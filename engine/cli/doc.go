// Package cli holds the pinned versions of the Pulumi CLI; the program itself is upstream's.
// See go.mod, and engine/build.py for how it is built.
package cli
