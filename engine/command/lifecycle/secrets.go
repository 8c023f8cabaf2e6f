package lifecycle

import (
	"context"
	"sort"
	"strings"

	"github.com/pulumi/pulumi/sdk/v3/go/property"
)

type secretsKey struct{}

// Within a connection, which is secret as a whole, only these are worth hiding: a message needs host and user.
var credentials = map[string]bool{"password": true, "privateKey": true, "privateKeyPassword": true}

// Shorter texts would blank half of a message and protect nothing.
const shortestSecret = 3

// WithSecrets remembers the secret values among a resource's properties, so that no log line and no error shows one.
func WithSecrets(ctx context.Context, properties ...property.Map) context.Context {
	var secrets []string
	for _, each := range properties {
		for name, value := range each.All {
			collect(value, false, name == "connection", name, &secrets)
		}
	}
	return context.WithValue(ctx, secretsKey{}, secrets)
}

// KeepSecret makes a command's output secret when anything that went into it was: a command may print its input.
// A connection does not count: it is always secret, and commands do not see it.
func KeepSecret(outputs property.Map, inputs ...property.Map) property.Map {
	secret := false
	for _, each := range inputs {
		secret = secret || property.New(each.Delete("connection")).HasSecrets()
	}
	if !secret {
		return outputs
	}
	for _, name := range []string{"stdout", "stderr"} {
		if value, ok := outputs.GetOk(name); ok {
			outputs = outputs.Set(name, value.WithSecret(true))
		}
	}
	return outputs
}

func collect(value property.Value, secret, connection bool, name string, secrets *[]string) {
	secret = secret || value.Secret()
	switch {
	case value.IsString():
		if secret && (!connection || credentials[name]) {
			*secrets = append(*secrets, value.AsString())
		}
	case value.IsArray():
		for _, element := range value.AsArray().All {
			collect(element, secret, connection, name, secrets)
		}
	case value.IsMap():
		for key, element := range value.AsMap().All {
			collect(element, secret, connection, key, secrets)
		}
	}
}

// redactor replaces every secret, and every line of one, by [secret].
func redactor(ctx context.Context) *strings.Replacer {
	secrets, _ := ctx.Value(secretsKey{}).([]string)
	texts := map[string]bool{}
	for _, secret := range secrets {
		for _, text := range append(strings.Split(secret, "\n"), secret) {
			if text = strings.TrimSpace(text); len(text) >= shortestSecret {
				texts[text] = true
			}
		}
	}
	longest := make([]string, 0, len(texts))
	for text := range texts {
		longest = append(longest, text)
	}
	// The longest first: one secret may be part of another.
	sort.Slice(longest, func(i, j int) bool { return len(longest[i]) > len(longest[j]) })
	pairs := make([]string, 0, 2*len(longest))
	for _, text := range longest {
		pairs = append(pairs, text, "[secret]")
	}
	return strings.NewReplacer(pairs...)
}
