// A bundle of AOTInductor packages as a denoiser, driven by its manifest alone.
#pragma once

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "safetensors.h"

struct Port {
  std::string name, kind, target;
  std::vector<int64_t> shape;
  at::ScalarType dtype;
};

struct Program {
  std::vector<Port> inputs, outputs;
  std::unique_ptr<torch::inductor::AOTIModelPackageLoader> loader;
};

// What one call of a program returned, by kind and target.
using Results = std::map<std::string, Tensors>;

class Bundle {
 public:
  explicit Bundle(const std::string& folder);

  // One step of the generation under way. arguments: the model's own, by name. Returns its first output.
  at::Tensor step(const Tensors& arguments);

  // The next call begins a generation.
  void reset();

  // What each step of the generation did: 'F' refreshed, 'R' reused.
  std::string decisions() const { return decisions_; }

 private:
  json::Value manifest_;
  Tensors weights_;
  std::map<std::string, Program> programs_;
  std::map<std::string, std::string> leaves_;  // by index, the argument's name

  // Cache state of the one guidance context: history and what guards keep, by target; what the probe handed on.
  Tensors history_, memory_, live_;
  double total_ = 0.0;
  long step_ = 0, run_ = 0, reuses_ = 0;
  std::string decisions_;

  Results run(const std::string& name, const Tensors& arguments, const Tensors& extra);
  at::Tensor planned(const Tensors& arguments);
  at::Tensor split(const Tensors& arguments);
  at::Tensor branching(const Tensors& arguments);
  void store(const Tensors& fresh, const std::map<std::string, long>& slots);
  at::Tensor moment() const;
  bool forced() const;
  bool refresh(double change);
  const json::Value& rule() const { return manifest_["schedule"]["rules"].array().at(0); }
  const json::Value* plan_entry() const;
};
