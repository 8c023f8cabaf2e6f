// The options of `runtime` in Pulumi.yaml and PulumiPolicy.yaml: virtualenv, toolchain, typechecker.
package main

import (
	"fmt"

	pulumirpc "github.com/pulumi/pulumi/sdk/v3/proto/go"
	"github.com/pulumi/pulumi/sdk/v3/python/toolchain"
)

// parseOptions reads the runtime options of a program; an unknown value is an error, an unknown key is not:
// newer CLIs may know more than this host.
func parseOptions(info *pulumirpc.ProgramInfo) (toolchain.PythonOptions, error) {
	options := toolchain.PythonOptions{Root: info.GetRootDirectory(), ProgramDir: info.GetProgramDirectory()}
	values := map[string]string{}
	for key, value := range info.GetOptions().AsMap() {
		switch key {
		case "virtualenv", "toolchain", "typechecker":
			text, ok := value.(string)
			if !ok {
				return options, fmt.Errorf("%s option must be a string", key)
			}
			values[key] = text
		}
	}
	options.Virtualenv = values["virtualenv"]

	if name, ok := values["toolchain"]; ok {
		switch name {
		case "pip":
			options.Toolchain = toolchain.Pip
		case "poetry":
			options.Toolchain = toolchain.Poetry
		case "uv":
			options.Toolchain = toolchain.Uv
		default:
			return options, fmt.Errorf("unsupported toolchain option: %s", name)
		}
	}
	if name, ok := values["typechecker"]; ok {
		switch name {
		case "mypy":
			options.Typechecker = toolchain.TypeCheckerMypy
		case "pyright":
			options.Typechecker = toolchain.TypeCheckerPyright
		default:
			return options, fmt.Errorf("unsupported typechecker option: %s", name)
		}
	}
	return options, nil
}

// resolve gives the toolchain that runs a program. A plugin (policy packs too) never runs in the ambient Python:
// without the option its virtual environment is `venv`, beside its own project file.
func resolve(info *pulumirpc.ProgramInfo, isPlugin bool) (toolchain.Toolchain, toolchain.PythonOptions, error) {
	options, err := parseOptions(info)
	if err != nil {
		return nil, options, err
	}
	if isPlugin && options.Toolchain == toolchain.Pip && options.Virtualenv == "" {
		options.Virtualenv = "venv"
	}
	chain, err := toolchain.ResolveToolchain(options)
	return chain, options, err
}
