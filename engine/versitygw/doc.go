// Package versitygw holds the pinned versions of the Versity S3 Gateway, an S3 server over a folder; see go.mod.
// The program itself is upstream's. Only tests of backups to a bucket need it; engine/build.py says how it is built.
package versitygw
