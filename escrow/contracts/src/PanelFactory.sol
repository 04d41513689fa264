// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Clones} from "@openzeppelin/contracts/proxy/Clones.sol";

import {ArbiterPanel} from "./ArbiterPanel.sol";

/// @title One panel for each threshold and set of members, at an address that follows from them
/// @notice Deploys, and says what it deployed. It has no power over a panel.
contract PanelFactory {
    /// @notice Each member costs a signature in the calldata of a ruling.
    uint256 public constant MEMBERS_MAX = 16;

    /// @notice The code that all panels share.
    address public immutable panelCode;

    /// @notice Whether this factory deployed the contract at that address.
    mapping(address panel => bool) public isPanel;

    event PanelDeployed(address indexed panel, uint256 threshold, address[] members);

    /// @notice Needed: 1 <= threshold <= members <= MEMBERS_MAX.
    error BadThreshold(uint256 threshold, uint256 members);
    /// @notice Members come by ascending address, each once, none of them zero.
    error NotAscending(address member);

    constructor(address escrows) {
        panelCode = address(new ArbiterPanel(escrows));
    }

    /// @notice Deploys the panel, or finds it deployed already.
    function deploy(uint256 threshold, address[] calldata members) external returns (address panel) {
        panel = panelOf(threshold, members);
        if (isPanel[panel]) return panel;
        isPanel[panel] = true;
        emit PanelDeployed(panel, threshold, members);
        Clones.cloneDeterministicWithImmutableArgs(panelCode, abi.encode(threshold, members), 0);
    }

    /// @notice Where the panel is, or will be: see `isPanel`.
    function panelOf(uint256 threshold, address[] calldata members) public view returns (address) {
        if (threshold == 0 || threshold > members.length || members.length > MEMBERS_MAX) {
            revert BadThreshold(threshold, members.length);
        }
        address last = address(0);
        for (uint256 i = 0; i < members.length; ++i) {
            if (members[i] <= last) revert NotAscending(members[i]);
            last = members[i];
        }
        return Clones.predictDeterministicAddressWithImmutableArgs(
            panelCode, abi.encode(threshold, members), 0, address(this)
        );
    }
}
