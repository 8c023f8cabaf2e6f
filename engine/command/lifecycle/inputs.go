// Package lifecycle is what local and remote commands share: when a command runs, and what becomes of its output.
// Names, defaults and semantics are those of pulumi_command 1.2.1.
package lifecycle

import (
	"fmt"

	p "github.com/pulumi/pulumi-go-provider"
	"github.com/pulumi/pulumi-go-provider/infer"
	"github.com/pulumi/pulumi/sdk/v3/go/property"
)

// Inputs say which command runs at which step of a resource's life.
type Inputs struct {
	Triggers               *[]any   `pulumi:"triggers,optional" provider:"replaceOnChanges"`
	Create                 *string  `pulumi:"create,optional"`
	Update                 *string  `pulumi:"update,optional"`
	Delete                 *string  `pulumi:"delete,optional"`
	Stdin                  *string  `pulumi:"stdin,optional"`
	Logging                *Logging `pulumi:"logging,optional"`
	AddPreviousOutputInEnv *bool    `pulumi:"addPreviousOutputInEnv,optional"`

	Environment *map[string]string `pulumi:"environment,optional"`
}

// Annotate gives defaults.
func (i *Inputs) Annotate(a infer.Annotator) { a.SetDefault(&i.AddPreviousOutputInEnv, true) }

// Outputs are what the last command wrote, without one trailing newline.
type Outputs struct {
	Stdout string `pulumi:"stdout"`
	Stderr string `pulumi:"stderr"`
}

// OnUpdate is the command of an update: `update`, else `create`, else none (nil).
func (i *Inputs) OnUpdate() *string {
	if i.Update != nil {
		return i.Update
	}
	return i.Create
}

// PreviousOutput gives the variables that tell a command what the one before it wrote.
func (i *Inputs) PreviousOutput(previous Outputs) [][2]string {
	if i.AddPreviousOutputInEnv != nil && !*i.AddPreviousOutputInEnv {
		return nil
	}
	var variables [][2]string
	if previous.Stdout != "" {
		variables = append(variables, [2]string{"PULUMI_COMMAND_STDOUT", previous.Stdout})
	}
	if previous.Stderr != "" {
		variables = append(variables, [2]string{"PULUMI_COMMAND_STDERR", previous.Stderr})
	}
	return variables
}

// Logging says which streams are shown while a command runs. Both are always captured.
type Logging string

// The values of `logging`. Without one both streams are shown.
const (
	LogStdout          Logging = "stdout"
	LogStderr          Logging = "stderr"
	LogStdoutAndStderr Logging = "stdoutAndStderr"
	LogNone            Logging = "none"
)

// Values lists them for the schema.
func (Logging) Values() []infer.EnumValue[Logging] {
	return []infer.EnumValue[Logging]{
		{Name: "stdout", Value: LogStdout, Description: "Capture stdout in logs but not stderr"},
		{Name: "stderr", Value: LogStderr, Description: "Capture stderr in logs but not stdout"},
		{Name: "stdoutAndStderr", Value: LogStdoutAndStderr, Description: "Capture stdout and stderr in logs"},
		{Name: "none", Value: LogNone, Description: "Capture no logs"},
	}
}

func (l *Logging) shows(stream Logging) bool {
	return l == nil || *l == LogStdoutAndStderr || *l == stream
}

// Names are the inputs declared here, as written in a program.
func Names() []string {
	return []string{
		"triggers", "create", "update", "delete", "stdin", "logging", "addPreviousOutputInEnv", "environment",
	}
}

// Unknown reports each property that a resource does not have: an input must never be ignored.
func Unknown(path string, properties property.Map, known ...string) []p.CheckFailure {
	names := map[string]bool{}
	for _, name := range known {
		names[name] = true
	}
	var failures []p.CheckFailure
	for name := range properties.All {
		// The engine adds names of its own, which begin with two underscores or are `version`.
		internal := path == "" && (name == "version" || len(name) > 1 && name[:2] == "__")
		if !names[name] && !internal {
			failures = append(failures, p.CheckFailure{
				Property: path + name,
				Reason:   fmt.Sprintf("unknown property %q: this provider does what pulumi_command 1.2.1 declares", path+name),
			})
		}
	}
	return failures
}

// CheckLogging reports a value of `logging` that does not exist.
func CheckLogging(properties property.Map) []p.CheckFailure {
	value := properties.Get("logging")
	if !value.IsString() {
		return nil
	}
	var none Logging
	for _, known := range none.Values() {
		if string(known.Value) == value.AsString() {
			return nil
		}
	}
	return []p.CheckFailure{{
		Property: "logging",
		Reason:   fmt.Sprintf("%q is not one of stdout, stderr, stdoutAndStderr, none", value.AsString()),
	}}
}
