// pulumi-language-python: the Python language host for the Pulumi CLI.
// The CLI starts it, reads the port of its gRPC server from the first line of output, and calls host.go's methods.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"time"

	"google.golang.org/grpc"

	"github.com/pulumi/pulumi/sdk/v3/go/common/util/cmdutil"
	"github.com/pulumi/pulumi/sdk/v3/go/common/util/logging"
	"github.com/pulumi/pulumi/sdk/v3/go/common/util/rpcutil"
	pulumirpc "github.com/pulumi/pulumi/sdk/v3/proto/go"
)

// How often the host asks whether the CLI that started it still lives; it ends itself when it does not.
const healthInterval = 5 * time.Minute

func main() {
	tracing := flag.String("tracing", "", "Emit tracing to a Zipkin-compatible tracing endpoint")
	executor := flag.String("use-executor", "", "Use this executor instead of the one beside the language host")
	// Older CLIs pass runtime options as flags as well; they come with every request, so these are read and dropped.
	for _, name := range []string{"virtualenv", "root", "typechecker", "toolchain"} {
		flag.String(name, "", "[obsolete] comes with the request")
	}
	flag.Parse()
	logging.InitLogging(false, 0, false)
	cmdutil.InitTracing("pulumi-language-python", "pulumi-language-python", *tracing)

	if *executor == "" {
		beside, err := executorBeside()
		if err != nil {
			cmdutil.Exit(err)
		}
		*executor = beside
	}
	if err := serve(*executor, flag.Arg(0), *tracing); err != nil {
		cmdutil.Exit(err)
	}
}

// executorBeside finds pulumi-language-python-exec in the folder of this program.
func executorBeside() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("could not determine current executable: %w", err)
	}
	// A link in bin/ may lead to the cache: the executor is looked for beside the link first, then beside its target.
	target, err := filepath.EvalSymlinks(self)
	if err != nil {
		return "", fmt.Errorf("could not determine current executable: %w", err)
	}
	for _, folder := range []string{filepath.Dir(os.Args[0]), filepath.Dir(self), filepath.Dir(target)} {
		path := filepath.Join(folder, "pulumi-language-python-exec")
		if filepath.IsAbs(path) {
			if _, err := os.Stat(path); err == nil {
				return path, nil
			}
		}
	}
	return "", fmt.Errorf("missing executor pulumi-language-python-exec beside %s: install the engine again", self)
}

func serve(executor, engineAddress, tracing string) error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	cancel := make(chan bool)
	go func() {
		<-ctx.Done()
		stop() // a second interrupt ends the process at once
		close(cancel)
	}()
	host := newHost(executor, engineAddress, tracing, func(address string) error {
		return rpcutil.Healthcheck(ctx, address, healthInterval, stop)
	})
	if engineAddress != "" {
		if err := host.watch(engineAddress); err != nil {
			return fmt.Errorf("could not start health check host RPC server: %w", err)
		}
	}
	handle, err := rpcutil.ServeWithOptions(rpcutil.ServeOptions{
		Cancel: cancel,
		Init: func(server *grpc.Server) error {
			pulumirpc.RegisterLanguageRuntimeServer(server, host)
			return nil
		},
		Options: rpcutil.OpenTracingServerInterceptorOptions(nil),
	})
	if err != nil {
		return fmt.Errorf("could not start language host RPC server: %w", err)
	}
	fmt.Printf("%d\n", handle.Port)
	if err := <-handle.Done; err != nil {
		return fmt.Errorf("language host RPC stopped serving: %w", err)
	}
	return nil
}
